"""What statistics say of a layer whose samples do not run: E[x^2] of its linears' inputs, and what can be folded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from snugfit.calibration.moments import drawn_together
from snugfit.engines.fused import group_modules
from snugfit.errors import UserError
from snugfit.methods.expert_folds import Product, is_linear_in_up
from snugfit.methods.folds import can_help
from snugfit.model.experts import DOWN, UP, why_not_linear_in_up
from snugfit.model.names import ROLES
from snugfit.model.skeleton import Skeleton
from snugfit.quantization.layer.load import LoadedGroup
from snugfit.quantization.plan import Plan
from snugfit.quantization.ways import Way
from snugfit.records.squares import decode_squares
from snugfit.records.statistics_file import Statistics
from snugfit.storage.safetensors_header import dtype_of


def recalled_squares(plan: Plan, skeleton: Skeleton, index: int, known: Statistics) -> dict[str, Tensor]:
    """E[x^2] fp32 [K] of the inputs of linears of decoder layer `index`, by the file's names.

    Experts that few tokens reached have it drawn to that of all (calibration/moments.py). Inputs of which nothing is
    known are missing. UserError for squares that are of other shapes than the weights.
    """
    found, squares = known.layers[index], dict[str, Tensor]()
    prefix = f"{plan.decoder}.{index}."
    shapes = {name: plan.weights.tensors[name].shape for name in plan.unit_of_layer(index)}
    modules = [name.removesuffix(".weight") for name in shapes if name in plan.assignments]
    for group in group_modules(modules):
        one = next((found.inputs[module] for module in group if module in found.inputs), None)
        if one is not None and one.squares is not None and one.tokens:
            squares |= dict.fromkeys(group, torch.from_numpy(decode_squares(one.squares)))
    mixture = skeleton.experts.get(index)
    seen = None if mixture is None else found.experts.get(prefix + mixture.file_module)
    if mixture is not None and seen is not None and seen.gate_up_squares and seen.down_squares and sum(seen.routed):
        counts = torch.tensor(seen.routed, dtype=torch.float32)
        gate_up, down = (
            drawn_together(torch.from_numpy(decode_squares(text)).view(len(counts), -1) * counts[:, None], counts)
            for text in (seen.gate_up_squares, seen.down_squares)
        )
        for (expert, role, parameter), name in mixture.names.items():
            if parameter == "weight" and expert < len(counts):
                squares[f"{prefix}{name}".removesuffix(".weight")] = (down if role == DOWN else gate_up)[expert]
    for module, numbers in squares.items():
        shape = shapes.get(f"{module}.weight", numbers.shape)
        if shape[-1] != len(numbers):
            what = f"the statistics have E[x^2] of {len(numbers)} input features, the weight has {shape[-1]}."
            raise UserError(
                what, code="statistics-mismatch", where=module, remedy="Measure them again with `collect_statistics`."
            )
    return squares


def observe_recalled(
    plan: Plan,
    skeleton: Skeleton,
    index: int,
    known: Statistics,
    way: Way,
    groups: Iterable[LoadedGroup],
    device: torch.device,
) -> tuple[Iterable[LoadedGroup], Any]:
    """Groups of decoder layer `index`, and what its way makes of statistics of them; all are in memory then."""
    assert way.recall is not None
    squares = {name: one.to(device) for name, one in recalled_squares(plan, skeleton, index, known).items()}
    held = list(groups)
    places = {name: group for group in held for name in group.tensors}

    def weight(linear: str) -> Tensor:
        name = f"{linear}.weight"
        return places[name].tensors[name].in_dtype(dtype_of(plan.weights.tensors[name]))

    products = [one for one in products_of(plan, skeleton, index) if f"{one.down}.weight" in places]
    return held, way.recall(squares, products, weight)


def products_of(plan: Plan, skeleton: Skeleton, index: int) -> list[Product]:
    """Gated MLPs and experts of decoder layer `index` whose up and down follow the effort, and that can be folded."""
    return [*_products_of_experts(plan, skeleton, index), *_products_of_linears(plan, skeleton, index)]


def _product(plan: Plan, up: str, down: str) -> Iterator[Product]:
    found = [plan.assignments.get(f"{name}.weight") for name in (up, down)]
    if all(one is not None and one.follows_effort for one in found) and found[1] is not None:
        fmt = found[1].format
        if fmt is not None and can_help(fmt):
            yield Product(up, down, fmt)


def _products_of_experts(plan: Plan, skeleton: Skeleton, index: int) -> Iterator[Product]:
    mixture, prefix = skeleton.experts.get(index), f"{plan.decoder}.{index}."
    if mixture is None or why_not_linear_in_up(skeleton.layers[index].get_submodule(mixture.module)):
        return
    for expert in sorted({number for number, _, _ in mixture.names}):
        up, down = (prefix + mixture.names[expert, role, "weight"].removesuffix(".weight") for role in (UP, DOWN))
        yield from _product(plan, up, down)


def _products_of_linears(plan: Plan, skeleton: Skeleton, index: int) -> Iterator[Product]:
    layer, prefix = skeleton.layers[index], f"{plan.decoder}.{index}."
    by_role: dict[tuple[str, str], tuple[str, str]] = {}
    for file_name, module_name in skeleton.names_of_layer(index).modules.items():
        parent, _, leaf = file_name.rpartition(".")
        if leaf in ROLES:
            by_role[parent, ROLES[leaf]] = file_name, module_name
    for (parent, role), (up, up_module) in by_role.items():
        down = by_role.get((parent, "down")) if role == "up" else None
        products = [] if down is None else list(_product(plan, prefix + up, prefix + down[0]))
        if down is None or not products:
            continue
        parents = {name.rpartition(".")[0] for name in (up_module, down[1])}
        leaves = [name.rpartition(".")[2] for name in (up_module, down[1])]
        if len(parents) == 1 and is_linear_in_up(layer.get_submodule(parents.pop()), *leaves):
            yield from products
