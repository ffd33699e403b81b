"""Names in a file and in transformers' modules, which differ: transformers' own rules, asked name by name.

A vision-language file may say language_model.model.layers.0 where the module is model.language_model.layers.0. What
transformers only renames needs no more than that; what it merges or splits (experts, fused towers) is told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class StoredNames:
    """Where a model's parameters and persistent buffers are in a file.

    `names` maps the model's name to the file's. `twice` are second tensors of the file for one of the model; `made` are
    parameters that transformers makes of others than itself, with the file's name of one of them.
    """

    names: Mapping[str, str]
    twice: Mapping[str, str]
    made: Mapping[str, str]


def stored_names(model: nn.Module, names: Iterable[str]) -> StoredNames:
    """What transformers would load each of `names`, a file's tensors, into.

    A quantized weight stands under the name that it would have in 16 bits: M.weight for M.weight_packed.
    """
    rename = _renamer(model)
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


def _renamer(model: nn.Module) -> Callable[[str], tuple[str, bool]]:
    """A function from a file's name to the model's, and whether more than the name changes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")

    def rename(name: str) -> tuple[str, bool]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:  # as in transformers: it is under the model's own name already
            target, pattern = rename_source_key(name, [], [], prefix, state)
        return str(target), pattern is not None

    return rename


def list_name(names: Mapping[str, str], layers_name: str, count: int) -> str:
    """The name in the file of the list of decoder layers that is `layers_name` in the model.

    `names` maps the model's names to the file's. Where the file has no such list, the model's name.
    """
    stored = {index: [n for m, n in names.items() if m.startswith(f"{layers_name}.{index}.")] for index in range(count)}
    first = next(iter(stored[0]), "") if count else ""
    parts = first.split(".")
    heads = [".".join(parts[:place]) for place, part in enumerate(parts) if part == "0"]
    for head in heads:
        if all(name.startswith(f"{head}.{index}.") for index, names_of in stored.items() for name in names_of):
            return head
    return layers_name
