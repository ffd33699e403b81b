"""Sets: YAML files that say which datasets samples come from, how many of each, and in which form.

    calibration_set:
      max_seq_length: 4096
      datasets:
        - dataset: mine.jsonl          # a file or folder beside this one, a Hub id, or builtin:NAME
          num_samples: 32              # or all
          category: Mine
        - dataset: org/name
          split: train
          columns: [question, answer]
          formatter: prompt_answer
          num_samples: 8

`docs/datasets.md` lists all keys. Keys that begin with _ hold YAML anchors and are ignored. Unknown keys are errors.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError, field_validator

from snugfit.data.formatters import AUTO, Formatter, Params, bind
from snugfit.errors import UserError
from snugfit.strict_yaml import YamlDocument, load_yaml, read_yaml_text

YAML_ENDINGS = (".yaml", ".yml")
ROOT = "calibration_set"
ALL = "all"
Draw = Literal["first", "random"]
_Count = Annotated[int, StrictInt, Field(ge=1)]
_Tokens = Annotated[int, StrictInt, Field(ge=2)]
_SEE = "docs/datasets.md lists the keys; `snugfit dataset default` prints an example."


class Source(BaseModel):
    """One entry of `datasets` as written.

    `draw` and `packing` replace those of the set. `num_samples` counts samples, "all" for as many
    as there are; `max_tokens` limits their tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Annotated[str, Field(min_length=1)]
    num_samples: _Count | Literal["all"]
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    columns: tuple[str, ...] = ()
    formatter: str = AUTO
    formatter_params: dict[str, Any] = Field(default_factory=dict)
    streaming: StrictBool = False
    draw: Draw | None = None
    packing: StrictBool | None = None
    max_tokens: _Tokens | None = None
    category: str = ""
    language: str = ""

    @field_validator("num_samples", mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        if value == ALL or (type(value) is int and value > 0):
            return value
        raise ValueError(f'must be a number >= 1 or "{ALL}", got {value!r}')

    @field_validator("columns", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("revision", "subset", "language", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        # YAML reads 1234567 as a number and no as false
        return {False: "no", True: "yes"}[value] if isinstance(value, bool) else _number_as_text(value)

    @field_validator("formatter_params", mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return {} if value is None else value


class DatasetSet(BaseModel):
    """What `calibration_set` holds.

    `max_tokens` limits the tokens of all samples. `without_template: join` reads conversations as plain text, message
    after message, where the tokenizer has no chat template. `unusable_sources: skip` goes on without a source of which
    no row can be used, for example since the chat template knows no tools.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    max_seq_length: Annotated[int, StrictInt, Field(ge=2)] = 4096
    shuffle: StrictBool = True
    seed: Annotated[int, StrictInt] = 42
    draw: Draw = "first"
    packing: StrictBool = False
    max_tokens: _Tokens | None = None
    without_template: Literal["refuse", "join"] = "refuse"
    unusable_sources: Literal["refuse", "skip"] = "refuse"
    datasets: Annotated[tuple[Source, ...], Field(min_length=1)]


@dataclass(frozen=True)
class LoadedSet:
    """A set, its name and text, and the formatter of each of its sources.

    `folder` is where its relative paths begin, None for a set of this package.
    """

    name: str
    set: DatasetSet
    text: str
    folder: Path | None
    formatters: tuple[Formatter, ...] = field(compare=False)
    document: YamlDocument = field(compare=False, repr=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the text with line feeds alone, hexadecimal."""
        return hashlib.sha256(self.text.replace("\r\n", "\n").encode()).hexdigest()

    def place_of(self, source: int, *path: str | int) -> str:
        """The place of a source for errors, such as mine.yaml:4: datasets[0]."""
        return self.document.place_of(ROOT, "datasets", source, *path).replace(f"{ROOT}.", "", 1)


def builtin_sets() -> list[str]:
    """Names of the sets in this package."""
    files = resources.files("snugfit.data").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def is_set(name_or_path: str | Path) -> bool:
    """Whether a dataset is a set: a YAML file, or the name of one in this package where there is no such file."""
    path = Path(name_or_path)
    return path.suffix.lower() in YAML_ENDINGS or (str(name_or_path) in builtin_sets() and not path.exists())


def load_set(name_or_path: str | Path) -> LoadedSet:
    """A set of this package by name, or one from a YAML file; UserError for a file that is not a valid set."""
    name, path = str(name_or_path), Path(name_or_path)
    if name in builtin_sets() and not path.exists():
        text = (resources.files("snugfit.data") / f"{name}.yaml").read_text(encoding="utf-8")
        return parse_set(text, name=name, where=f"set {name}")
    if not path.is_file():
        near = get_close_matches(path.stem, builtin_sets(), n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Sets of this package: {', '.join(builtin_sets())}."
        raise UserError("no such file, and no set of this name.", code="file-missing", where=name, remedy=remedy)
    return parse_set(read_yaml_text(path), name=path.name, where=name, folder=path.resolve().parent)


def parse_set(text: str, *, name: str, where: str, folder: Path | None = None) -> LoadedSet:
    """A set from YAML text; UserError, with the line and the key's path, for a text that is not a valid set."""
    document = load_yaml(text, where=where)
    root = document.value
    if not isinstance(root, dict) or not isinstance(root.get(ROOT), dict):
        what = f"a set must be a mapping with `{ROOT}`."
        near = get_close_matches(ROOT, map(str, root), n=1) if isinstance(root, dict) else []
        raise _invalid(what, where, f"Rename `{near[0]}` to `{ROOT}`." if near and near[0] != ROOT else _SEE)
    other = next((key for key in root if key != ROOT and not str(key).startswith("_")), None)
    if other is not None:
        raise _invalid(f"unknown key beside `{ROOT}`.", document.place_of(other), "Remove it.")
    content = {key: value for key, value in root[ROOT].items() if not str(key).startswith("_")}
    try:
        found = DatasetSet.model_validate(content)
    except ValidationError as error:
        raise _explain(error, document) from None
    formatters = []
    for number, source in enumerate(found.datasets):
        place = (ROOT, "datasets", number)
        try:
            formatters.append(bind(source.formatter, Params(source.columns, source.formatter_params)))
        except UserError as error:
            path = tuple(part for part in error.where.split(".") if part)
            raise error.at(document.place_of(*place, *path)) from None
    return LoadedSet(name, found, text, folder, tuple(formatters), document)


def _explain(error: ValidationError, document: YamlDocument) -> UserError:
    """The most helpful of pydantic's errors, at its line."""
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    known = [*DatasetSet.model_fields, *Source.model_fields]
    # pydantic adds the names of a union's members to the place
    path = [part for part in first["loc"] if isinstance(part, int) or part in known or part == first["loc"][-1]]
    while (
        len(path) > 1 and path[-1] not in known and not isinstance(path[-1], int) and first["type"] != "extra_forbidden"
    ):
        path.pop()
    place = document.place_of(ROOT, *path)
    if first["type"] == "extra_forbidden":
        fields = list(Source.model_fields if len(path) > 1 else DatasetSet.model_fields)
        near = get_close_matches(str(path[-1]), fields, n=1)
        return _invalid("unknown key.", place, f"Did you mean {near[0]}?" if near else f"Known: {', '.join(fields)}.")
    message = str(first["msg"]).removeprefix("Value error, ")
    return _invalid(f"{message[:1].lower()}{message[1:]}.", place, _SEE)


def _number_as_text(value: Any) -> Any:
    return str(value) if type(value) in (int, float) else value


def _invalid(what: str, where: str, remedy: str) -> UserError:
    return UserError(what, code="dataset-set-invalid", where=where, remedy=remedy)
