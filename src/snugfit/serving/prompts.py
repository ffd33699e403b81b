"""Prompts of a given number of tokens, no two of which begin alike.

Tokens are drawn at random from those of common words, as the server itself splits them (its /tokenize): a prompt of ids
has exactly the tokens that were asked for. A server without /tokenize gets words; two short requests measure how many
tokens a word has. The first tokens of a prompt are never those of another, so a prefix cache has nothing to find.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

_TEXT = (
    "about above across act action after again age ago air all almost alone along already also although always "
    "among animal another answer any apple area arm army art ask back ball bank base bed before begin behind best "
    "better between big bird black blood blue board boat body book both bottom box boy bread break bring brother "
    "build busy call can car card care carry case catch cause cell center chair change check child choose city "
    "class clear close cloud coast cold color come common cook cool copy corner cost could country course cover "
    "cross crowd cut dance dark day dead deal deep design desk dinner direct dog door double down draw dream dress "
    "drink drive drop dry each early earth east eat edge effect egg eight else end engine enough even evening ever "
    "every eye face fact fall family far farm fast father fear feel feet few field fight figure fill film final "
    "find fine finger fire first fish five flat floor flow flower fly food foot force forest form forward four free "
    "fresh friend front fruit full game garden gas gate general get girl give glass go gold good grass great green "
    "ground group grow hair half hand happy hard hat have head hear heart heat heavy help high hill history hold "
    "home hope horse hot hour house how hundred idea ice inch island job join just keep key kind king know lady "
    "lake land language large last late laugh law lay lead learn leave left leg less letter level life light like "
    "line list listen little live long look lost love low machine main make man many map mark market matter may "
    "mean measure meat meet middle mile milk mind minute miss money month moon more morning most mother mountain "
    "mouth move much music must name near neck need never new next night nine noise north nose note nothing number "
    "ocean off office often oil old once one only open order other over own page paint pair paper park part pass "
    "past path pay people perhaps person picture piece place plan plane plant play point poor power present press "
    "price problem product public pull push question quick quiet race rain raise reach read ready real reason "
    "record red rest rich ride right ring river road rock roll room root rope rose round row rule run safe sail "
    "salt same sand say school science sea season seat second see seed sell send sense serve set seven several "
    "shape share sharp sheet ship shoe shop short should show side sign silver simple sing sister sit six size skin "
    "sky sleep slow small smell smile snow soft soil some son song soon sound south space speak speed spell spend "
    "spring square stand star start state station stay steel step stick still stone stop store storm story street "
    "strong student study such sugar summer sun sure surface table tail take talk tall teach team tell ten test "
    "than thank that then there thick thin thing think third those thought three through time tiny today together "
    "tomorrow tone too tool top total touch toward town track trade train travel tree trip true try turn twenty two "
    "under unit until up use usual valley value very view village visit voice wait walk wall want war warm wash "
    "watch water wave way weather week weight well west wheel when white why wide wife wild will wind window wing "
    "winter wish with woman wonder wood word work world write year yellow yes young "
)
WORDS = tuple(_TEXT.split())
MIN_POOL = 64  # different tokens
BEGINNING = 8  # tokens of a prompt that no other prompt has: shorter than any engine's block


@dataclass
class PromptMaker:
    """Makes prompts from `pool`: token ids, or words where the server takes no ids. `seed` decides all of them.

    `tokens_per_word` and `added_tokens` say what a text of words becomes; with ids they are 1 and 0.
    """

    pool: Sequence[int] | Sequence[str]
    seed: int
    tokens_per_word: float = 1.0
    added_tokens: float = 0.0
    _used: set[tuple[int | str, ...]] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)  # noqa: S311  # not for secrets

    @property
    def of_ids(self) -> bool:
        """Whether prompts are lists of token ids."""
        return bool(self.pool) and isinstance(self.pool[0], int)

    def make(self, tokens: int) -> list[int] | str:
        """A prompt of that many tokens (nearly, if made of words), whose beginning no other prompt has."""
        count = max(1, round((tokens - self.added_tokens) / self.tokens_per_word))
        while True:
            chosen: list[int | str] = self._random.choices(list(self.pool), k=count)
            beginning = tuple(chosen[:BEGINNING])
            if beginning not in self._used or count < BEGINNING:
                break
        self._used.add(beginning)
        return [int(part) for part in chosen] if self.of_ids else " ".join(map(str, chosen))
