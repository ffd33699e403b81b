"""The one exception that a user's input can cause."""


class UserError(Exception):
    """Bad input. `what` is wrong at `where`; `remedy` says what to do. The CLI prints it and exits with code 2."""

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(self.__str__())

    def __str__(self) -> str:
        """The three parts in one line, the place first."""
        place = f"{self.where}: " if self.where else ""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{place}{self.what}{remedy}"


class Unfinished(UserError):  # noqa: N818  # it is one
    """A UserError that leaves what an unfinished run has done: a lost network, or another machine than it began on."""
