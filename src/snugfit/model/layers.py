"""Weights put into transformers' modules: one decoder layer in memory, or what surrounds the layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from snugfit.errors import UserError
from snugfit.model import experts
from snugfit.model.assemble import part_of
from snugfit.model.layer_stubs import put, token_embeddings
from snugfit.model.skeleton import MISMATCH_REMEDY, Skeleton
from snugfit.storage.checkpoint import Checkpoint, read_tensor


@dataclass(frozen=True)
class ExpertBuffers:
    """Memory for a layer's routed experts, as its module holds them, filled expert by expert.

    `stacked` are the module's parameters by name relative to the layer; `per_expert` are views of single experts'
    tensors by the file's full names. Buffers of a few experts hold `some` of them at a time.
    """

    stacked: Mapping[str, Tensor]
    per_expert: Mapping[str, Tensor]
    skeleton: Skeleton
    parts: Mapping[tuple[int, str, str], Tensor] = field(default_factory=dict)

    def of(self, index: int, some: range) -> ExpertBuffers:
        """The same memory, as that of `some` experts of decoder layer `index`."""
        names = self.skeleton.experts[index].names
        prefix = f"{self.skeleton.stored_layers_name}.{index}"
        held = {
            f"{prefix}.{names[some.start + place, role, parameter]}": part
            for (place, role, parameter), part in self.parts.items()
            if place < len(some)
        }
        return replace(self, per_expert=held)

    def has(self, name: str) -> bool:
        """Whether the buffers hold a tensor of the file, of one expert or of all."""
        return name in self.per_expert or name in self.skeleton.stacks.stacked

    def copy_in(self, name: str, tensor: Tensor) -> bool:
        """Copy a tensor of the file, of one expert or of all, into the buffers; False if it belongs to no expert."""
        if name in self.per_expert:
            self.per_expert[name].copy_(_as_values(tensor, self.per_expert[name].dtype, name))
            return True
        singles = self.skeleton.stacks.stacked.get(name, ())
        for single in (one for one in singles if one in self.per_expert):
            part = part_of(self.skeleton.stacks.origins[single], tensor)
            self.per_expert[single].copy_(_as_values(part, self.per_expert[single].dtype, name))
        return bool(singles)


def expert_buffers(skeleton: Skeleton, index: int, device: torch.device, size: int | None = None) -> ExpertBuffers:
    """Buffers for the routed experts of decoder layer `index`, empty ones if it has none; of `size` experts or all."""
    mixture = skeleton.experts.get(index)
    if mixture is None:
        return ExpertBuffers({}, {}, skeleton)
    module = skeleton.layers[index].get_submodule(mixture.module)
    stacked, parts = experts.buffers(module, device, size)
    whole = {f"{mixture.module}.{name}": tensor for name, tensor in stacked.items()}
    held = ExpertBuffers(whole, {}, skeleton, parts)
    return held if size else held.of(index, range(experts.count(module)))


def resident_layer(
    skeleton: Skeleton,
    index: int,
    weights: Mapping[str, Tensor],
    device: torch.device,
    *,
    size: int | None = None,
    read: experts.ReadExpert | None = None,
) -> nn.Module:
    """A copy of decoder layer `index` with `weights` (names as in the file, relative to the layer) on `device`.

    Routed experts come as their module's parameters (`expert_buffers`), which hold `size` of them or all; then `read`
    gives the weights of any (`experts.weight_of`).
    """
    empty = skeleton.layers[index]
    # parameters are all replaced, and configs, which have hundreds of values, are only read
    configs = [config for module in empty.modules() if (config := getattr(module, "config", None)) is not None]
    layer = copy.deepcopy(empty, {id(shared): shared for shared in (*empty.parameters(), *configs)})
    if size is not None:
        experts.hold_some(layer.get_submodule(skeleton.experts[index].module), size, read)
    names = skeleton.names_of_layer(index).parameters
    given = {names.get(name, name): tensor for name, tensor in weights.items()}
    fill(layer, given, where=f"{skeleton.stored_layers_name}.{index}")
    return layer.to(device)


def fill(module: nn.Module, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Give `module` its parameters and persistent buffers, in the dtypes that it declares: all of them and no other."""
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in weights]
    unknown = [name for name in weights if name not in wanted]
    wrong = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    for names, problem in ((missing, "missing"), (unknown, "unknown to transformers"), (wrong, "of another shape")):
        if names:
            what = f"tensors {problem}: {', '.join(names[:5])}."
            code = "weights-missing" if names is missing else "config-mismatch"
            raise UserError(what, code=code, where=where, remedy=MISMATCH_REMEDY)
    cast = {name: _as_values(weights[name], wanted[name].dtype, f"{where}.{name}") for name in wanted}
    module.load_state_dict(cast, strict=True, assign=True)
    module.requires_grad_(False)
    left = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.device.type == "meta"]
    if left:
        what = f"tensors without data: {', '.join(left[:5])}."
        raise UserError(what, code="config-mismatch", where=where, remedy=MISMATCH_REMEDY)


def _as_values(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in `dtype`; UserError for codes, which are no values: the last of several checks."""
    if dtype.is_floating_point and not (tensor.is_floating_point() and tensor.itemsize > 1):
        raise UserError(
            f"is {str(tensor.dtype).removeprefix('torch.')}, but nothing says how its codes are decoded.",
            code="dtype-unsupported",
            where=name,
            remedy="Start from the original BF16, FP16 or FP32 checkpoint.",
        )
    return tensor.to(dtype)


def with_layers(skeleton: Skeleton, layers: list[nn.Module], weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the whole model around other layers, with `weights` (by the model's names) in the rest of it.

    A tied weight has several names; `outer_weights` gives one tensor for all of them.
    """
    model = copy.deepcopy(skeleton.model, {id(skeleton.layers): nn.ModuleList(layers)})
    for name, tensor in weights.items():
        old = getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        if old.shape != tensor.shape:
            raise UserError(
                f"has shape {list(tensor.shape)}, but config.json gives it {list(old.shape)}.",
                code="config-mismatch",
                where=skeleton.file_name(name),
                remedy=MISMATCH_REMEDY,
            )
        put(model, name, _as_values(tensor, old.dtype, skeleton.file_name(name)))
    return model


def outer_weights(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    *,
    head: bool,
    decoded: Mapping[str, Tensor] | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Tensors outside the decoder layers by the model's names: with the output head, or (head=False) the embeddings.

    A tied tensor is read once, under whichever name the file has it. `decoded` tensors, by the file's names, are not
    read. `read` reads a tensor by its name in the file, by default to the CPU. UserError if one is missing.
    """
    state = skeleton.model.state_dict(keep_vars=True)
    unused = {id(tensor) for module in _skipped(skeleton, head=head) for tensor in module.parameters()}
    names = {
        name: skeleton.file_name(name)
        for name, tensor in state.items()
        if not name.startswith(skeleton.layers_name + ".") and (id(tensor) not in unused or _is_tied(state, name))
    }
    found: dict[int, Tensor] = {}
    for name in state:
        file_name = skeleton.file_name(name)
        if decoded and file_name in decoded:
            found[id(state[name])] = decoded[file_name]
    for name, file_name in names.items():
        if file_name in checkpoint.tensors and id(state[name]) not in found:
            found[id(state[name])] = read(file_name) if read is not None else read_tensor(checkpoint, file_name)
    missing = [file_name for name, file_name in names.items() if id(state[name]) not in found]
    if missing:
        what = f"tensors missing: {', '.join(missing[:5])}."
        raise UserError(what, code="weights-missing", where=str(checkpoint.path), remedy=MISMATCH_REMEDY)
    return {name: found[id(state[name])] for name in names}


def _skipped(skeleton: Skeleton, *, head: bool) -> list[nn.Module]:
    """Modules that one end of the model does not need: the token embeddings for the head, else the head."""
    if head:
        return [*token_embeddings(skeleton.model).values()]
    output = skeleton.model.get_output_embeddings()  # type: ignore[operator]
    return [] if output is None else [output]


def _is_tied(state: dict[str, Tensor], name: str) -> bool:
    return sum(tensor is state[name] for tensor in state.values()) > 1
