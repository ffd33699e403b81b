"""The one exception that a user's input can cause."""

LONGEST = 2000  # characters of one part of a message


class UserError(Exception):
    """Bad input. `what` is wrong at `where`; `remedy` says what to do. The CLI prints it and exits with code 2."""

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what = plain(what)
        self.where = plain(where)
        self.remedy = plain(remedy)
        super().__init__(self.__str__())

    def __str__(self) -> str:
        """The three parts in one line, the place first."""
        place = f"{self.where}: " if self.where else ""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{place}{self.what}{remedy}"


class Unfinished(UserError):  # noqa: N818  # it is one
    """A UserError that leaves what an unfinished run has done: a lost network, or another machine than it began on."""


def plain(text: str, longest: int = LONGEST) -> str:
    """`text` as a terminal may show it: what cannot be printed is escaped, the middle of a long one left out.

    Names and values out of a model's files could else move the cursor, hide what follows, or fill the screen.
    """
    if len(text) > longest:
        text = f"{text[: longest * 3 // 4]} … {text[-longest // 4 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
