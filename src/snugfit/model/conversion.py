"""Maps names in a file to names in transformers' modules, by transformers' own rules.

A vision-language file may say language_model.model.layers.0 for the module model.language_model.layers.0. What
transformers only renames needs no more than that; what it merges or splits (experts, fused towers) is kept separate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from snugfit.model.transformers_api import renamer


@dataclass(frozen=True)
class StoredNames:
    """Where a model's parameters and persistent buffers are in a file.

    `names` maps the model's name to the file's. `twice` has the second of two tensors of the file that are one in the
    model; `made` the parameters that transformers makes of several tensors, with the file's name of one of them.
    """

    names: Mapping[str, str]
    twice: Mapping[str, str]
    made: Mapping[str, str]


def stored_names(model: nn.Module, names: Iterable[str]) -> StoredNames:
    """What transformers would load each of `names`, a file's tensors, into.

    A quantized weight has the name that it would have in 16 bits: M.weight for M.weight_packed.
    """
    rename = renamer(model)
    state = model.state_dict().keys()
    given = list(names)
    found: dict[str, str] = {}
    twice: dict[str, str] = {}
    made: dict[str, str] = {}
    for name in given:
        target, converted = rename(name)
        if converted:
            made.setdefault(target, name)
        elif target in state and target in found:
            twice[target] = name
        elif target in state:
            found[target] = name
    weights = dict.fromkeys(f"{name.rpartition('.')[0]}.weight" for name in given)
    for name in weights:
        target, converted = rename(name)
        if target in state and not converted:
            found.setdefault(target, name)
    return StoredNames(found, twice, {target: name for target, name in made.items() if target in state})


def list_name(names: Mapping[str, str], layers_name: str, count: int) -> str:
    """The name in the file of the list of decoder layers that is `layers_name` in the model.

    `names` maps the model's names to the file's. The model's name if the file has no such list.
    """
    stored = {index: [n for m, n in names.items() if m.startswith(f"{layers_name}.{index}.")] for index in range(count)}
    first = next(iter(stored[0]), "") if count else ""
    parts = first.split(".")
    heads = [".".join(parts[:place]) for place, part in enumerate(parts) if part == "0"]
    for head in heads:
        if all(name.startswith(f"{head}.{index}.") for index, names_of in stored.items() for name in names_of):
            return head
    return layers_name
