"""transformers' model code without its weights: parameters on the meta device, one decoder layer in memory."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from snugfit.errors import UserError
from snugfit.model.checkpoint import Checkpoint, read_tensor


@dataclass(frozen=True)
class Skeleton:
    """A causal language model whose parameters have shapes but no data; its buffers are real.

    `layers_name` is the decoder layers' name in the model and so in the checkpoint, e.g. model.layers.
    """

    model: nn.Module
    layers: nn.ModuleList
    layers_name: str


class _EmptyOnMeta(TorchFunctionMode):
    """Sends torch.empty to the meta device: it makes parameters, whose data is of no use here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "meta"} if func is torch.empty else kwargs))


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside keep real buffers, computed by their own code, while every parameter lands on meta."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment,method-assign]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Skeleton:
    """The model that the checkpoint's config describes; UserError where transformers does not know it.

    It computes in `dtype`, by default the config's own.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = str(checkpoint.path / "config.json")
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
        with _parameters_on_meta(), torch.no_grad():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or own, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 (transformers' config classes raise many kinds of their own)
        kind = checkpoint.config.get("model_type")
        raise UserError(
            f"transformers cannot build model_type {kind!r}: {_first_line(error)}",
            where=where,
            remedy="Check the config, or update transformers.",
        ) from None
    model.eval().requires_grad_(False)
    empty = [name for name, buffer in model.named_buffers() if buffer.device.type == "meta"]
    if empty:
        raise UserError(f"buffers that this model never computes: {', '.join(empty[:5])}.", where=where)
    name, layers = _decoder_layers(model, where)
    return Skeleton(model, layers, name)


def _decoder_layers(model: nn.Module, where: str) -> tuple[str, nn.ModuleList]:
    decoder = model.get_decoder()  # type: ignore[operator]
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"{type(model).__name__} has no list of decoder layers.", where=where)
    name = next(name for name, module in model.named_modules() if module is layers)
    return name, layers


def check_shapes(skeleton: Skeleton, checkpoint: Checkpoint, stored: Mapping[str, tuple[str, int]]) -> None:
    """UserError where a parameter is missing from the headers, or has another shape there than the config asks for.

    `stored` are the weights under other names: that of the codes, and how many values one element of them holds.
    """
    problems = []
    aliases: dict[int, list[str]] = {}
    for name, tensor in skeleton.model.state_dict(keep_vars=True).items():
        aliases.setdefault(id(tensor), []).append(name)
        kept, packed = stored.get(name, (name, 1))
        found = checkpoint.tensors.get(kept)
        wanted = (*tensor.shape[:-1], -(-tensor.shape[-1] // packed)) if tensor.dim() else ()
        if found is not None and found.shape != wanted:
            problems.append(f"{kept} has shape {list(found.shape)}, the config asks for {list(wanted)}")
    problems += [
        f"{names[0]} is missing"
        for names in aliases.values()  # a tied tensor is there once
        if not any(stored.get(name, (name, 1))[0] in checkpoint.tensors for name in names)
    ]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(
            f"{problems[0]}{more}.", where=str(checkpoint.path), remedy="Config and weights do not belong together."
        )


def linear_names(skeleton: Skeleton) -> set[str]:
    """Module names of every nn.Linear, as in the checkpoint."""
    return {name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear)}


def resident_layer(skeleton: Skeleton, index: int, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """A copy of decoder layer `index` with `weights` (names relative to the layer) on `device`."""
    layer = copy.deepcopy(skeleton.layers[index])
    fill(layer, weights, where=f"{skeleton.layers_name}.{index}")
    return layer.to(device)


def fill(module: nn.Module, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Give `module` its parameters and persistent buffers, in the dtypes it declares; all must be there, no other."""
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in weights]
    unknown = [name for name in weights if name not in wanted]
    wrong = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    for names, problem in ((missing, "missing"), (unknown, "unknown to transformers"), (wrong, "of another shape")):
        if names:
            raise UserError(
                f"tensors {problem}: {', '.join(names[:5])}.",
                where=where,
                remedy="Config and weights do not belong together.",
            )
    cast = {name: weights[name].to(wanted[name].dtype) for name in wanted}
    module.load_state_dict(cast, strict=True, assign=True)
    module.requires_grad_(False)
    left = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.device.type == "meta"]
    if left:
        raise UserError(f"tensors without data: {', '.join(left[:5])}.", where=where)


def with_layers(skeleton: Skeleton, layers: list[nn.Module], weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the whole model around other layers; of the rest, `weights` (full names) are filled in, others not.

    A tied weight has several names; `outer_weights` gives one tensor for all of them.
    """
    model = copy.deepcopy(skeleton.model, {id(skeleton.layers): nn.ModuleList(layers)})
    for name, tensor in weights.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        old = getattr(owner, leaf)
        if old.shape != tensor.shape:
            raise UserError(
                f"{name} has shape {list(tensor.shape)}, the config asks for {list(old.shape)}.",
                remedy="Config and weights do not belong together.",
            )
        value = tensor.to(old.dtype)
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value)
    return model


def outer_weights(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    *,
    head: bool,
    decoded: Mapping[str, Tensor] | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Tensors outside the decoder layers by full name: with the output head, or (head=False) with the embeddings.

    A tied tensor is read once, under whichever name the file has it; `decoded` ones are taken as given. `read` gives a
    tensor by its name in the file, by default on the CPU.
    """
    model = skeleton.model
    skipped = model.get_input_embeddings() if head else model.get_output_embeddings()  # type: ignore[operator]
    state = model.state_dict(keep_vars=True)
    unused = {id(tensor) for tensor in skipped.state_dict(keep_vars=True).values()} if skipped is not None else set()
    names = [
        name
        for name, tensor in state.items()
        if not name.startswith(skeleton.layers_name + ".") and (id(tensor) not in unused or _is_tied(state, name))
    ]
    found: dict[int, Tensor] = {id(state[name]): tensor for name, tensor in (decoded or {}).items() if name in state}
    for name in names:
        if name in checkpoint.tensors and id(state[name]) not in found:
            found[id(state[name])] = read(name) if read is not None else read_tensor(checkpoint, name)
    missing = [name for name in names if id(state[name]) not in found]
    if missing:
        raise UserError(
            f"tensors missing: {', '.join(missing[:5])}.",
            where=str(checkpoint.path),
            remedy="Config and weights do not belong together.",
        )
    return {name: found[id(state[name])] for name in names}


def _is_tied(state: dict[str, Tensor], name: str) -> bool:
    return sum(tensor is state[name] for tensor in state.values()) > 1


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
