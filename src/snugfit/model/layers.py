"""transformers' model code without its weights: parameters on the meta device, one decoder layer in memory.

Of a vision-language model only what runs on text is kept. Names outside this module are those of the file; `stored`
leads from transformers' names to them.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from snugfit.errors import UserError
from snugfit.model import experts, transformers_api
from snugfit.model.assemble import part_of
from snugfit.model.conversion import StoredNames, list_name, stored_names
from snugfit.model.layer_stubs import TextOnly, alike, put, token_embeddings, trace_layer_calls
from snugfit.model.layout import ModelLayout
from snugfit.model.logical_weights import LogicalWeights, stacked_weights
from snugfit.storage.checkpoint import Checkpoint, read_tensor
from snugfit.storage.safetensors_header import TensorInfo

MISMATCH_REMEDY = "Config and weights do not belong together."


@dataclass(frozen=True)
class Skeleton:
    """A causal language model whose parameters have shapes but no data; its buffers are real.

    `layers_name` is the decoder layers' name in the model, `stored_layers_name` in the file; `stored` maps names of
    the model's parameters and persistent buffers to those in the file, as far as it has them (a quantized weight: to
    its name in 16 bits). Experts in 3-D parameters are not among them, but in `experts` by layer; where the file holds
    all of a layer in one tensor, `stacks` takes them apart. `returns_tuple`: layers answer with tuples; `carries_state`: they
    leave more for later layers than hidden states, such as Gemma 4's shared keys and values, which are lost where a
    walk begins in the middle.
    """

    model: nn.Module
    layers: nn.ModuleList
    layers_name: str
    stored_layers_name: str
    stored: Mapping[str, str]
    returns_tuple: bool
    carries_state: bool
    experts: Mapping[int, experts.ExpertNames]
    stacks: LogicalWeights

    @property
    def config(self) -> Any:
        """transformers' config of the language model."""
        return self.model.config.get_text_config()  # type: ignore[union-attr,operator]


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


def open_skeleton(layout: ModelLayout, dtype: torch.dtype | None = None) -> Skeleton:
    """The model that a layout describes, in agreement with its headers; UserError if transformers and they disagree."""
    skeleton = build_skeleton(layout, dtype)
    if skeleton.stored_layers_name != layout.decoder:
        raise UserError(
            f"its decoder layers seem to be {layout.decoder}, but transformers takes {skeleton.stored_layers_name}.",
            code="config-mismatch",
            where=str(layout.checkpoint.path),
            remedy="Config and weights do not belong together, or this family needs a reader of its own.",
        )
    origins = layout.weights.origins.items()
    codes = {name: (next(iter(origin.parts.values())), 1) for name, origin in origins if origin.part is None}
    check_shapes(skeleton, layout.checkpoint, codes)
    return skeleton


def build_skeleton(layout: ModelLayout, dtype: torch.dtype | None = None) -> Skeleton:
    """The model that config.json describes; UserError if transformers does not know it.

    It computes in `dtype`, by default the config's own. Code that comes with a checkpoint is never run.
    """
    checkpoint, where = layout.checkpoint, layout.config_file
    kind = checkpoint.config.get("model_type")
    if not transformers_api.is_known_architecture(kind):
        raise UserError(
            f"unknown architecture {kind!r}: transformers has no model_type of that name.",
            code="architecture-unknown",
            where=where,
            remedy="Check the config, or update transformers.",
        )
    model = _build_model(checkpoint, dtype, where)
    stored = stored_names(model, checkpoint.tensors)
    decoder = model.get_decoder()  # type: ignore[operator]
    name, layers = _decoder_layers(model, decoder, where)
    tokens = _plain_tokens(model.config)
    whole = trace_layer_calls(model, layers, tokens, where=where)
    if model.config.get_text_config() is not model.config:  # type: ignore[union-attr,operator]
        _leave_towers(model, decoder, where)
        alone = trace_layer_calls(model, layers, tokens, where=where)
        if not all(map(alike, whole.calls, alone.calls)):
            what = f"{type(model).__name__} does not run text as its language model alone would: not handled yet."
            raise UserError(what, where=where, remedy="Evaluate or quantize a text model.")
    mixtures = {n: module for n, layer in enumerate(layers) if (module := experts.find_experts(layer, where=where))}
    experts.use(model)
    held = {
        f"{name}.{number}.{inside}" for number, module in mixtures.items() for inside in _held(layers[number], module)
    }
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in held}
    _check_names(stored, state, checkpoint)
    names = {ours: theirs for ours, theirs in stored.names.items() if ours in state}
    empty = [name for name, buffer in model.named_buffers() if buffer.device.type == "meta" and name not in state]
    if empty:
        raise UserError(f"buffers that this model never computes: {', '.join(empty[:5])}.", where=where)
    left = any(isinstance(value, MutableMapping) for _, _, kwargs in whole.calls for value in kwargs.values())
    carries_state = left and getattr(decoder.config, "num_kv_shared_layers", None) != 0
    theirs = list_name(names, name, len(layers))
    stacks = stacked_weights(checkpoint, layout.dialect)
    singles = experts.single_experts(checkpoint, stacks, theirs)
    named = {n: experts.expert_names(layers[n], module, singles.get(n, {})) for n, module in mixtures.items()}
    return Skeleton(model, layers, name, theirs, names, whole.returns_tuple, carries_state, named, stacks)


def hidden_size(skeleton: Skeleton) -> int:
    """Values of a hidden state, H."""
    return int(skeleton.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]


def _plain_tokens(config: Any) -> Tensor:
    """Four times a token [1, 4] that stands for nothing but text."""
    special = {value for key, value in config.to_dict().items() if "token" in key and isinstance(value, int)}
    return torch.full((1, 4), next(token for token in range(len(special) + 1) if token not in special))


def _build_model(checkpoint: Checkpoint, dtype: torch.dtype | None, where: str) -> nn.Module:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        named = (dtype, config.dtype, config.get_text_config().dtype)
        arithmetic = next((given for given in named if isinstance(given, torch.dtype)), torch.bfloat16)
        with _parameters_on_meta(), torch.no_grad():
            model = transformers_api.auto_class(config).from_config(config, dtype=arithmetic, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 (transformers' config classes raise many kinds of their own)
        kind, reason = checkpoint.config.get("model_type"), _first_line(error)
        if "trust_remote_code" in reason:
            reason = "it is code of the model's own, which is never run."
        raise UserError(
            f"transformers cannot build model_type {kind!r}: {reason}",
            where=where,
            remedy="Check the config, or update transformers.",
        ) from None
    model.eval().requires_grad_(False)
    for pattern, kept in transformers_api.dtype_plan(model, arithmetic).items():
        for name, parameter in [*model.named_parameters()]:
            if re.search(pattern.replace("*", ".*"), name):
                put(model, name, parameter.to(kept))
    found: nn.Module = model
    return found


def _decoder_layers(model: nn.Module, decoder: nn.Module, where: str) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers, called so in most families; else the only list of as many modules as layers."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)  # type: ignore[union-attr,operator]
    lists = {name: child for name, child in decoder.named_children() if isinstance(child, nn.ModuleList)}
    fitting = [child for child in lists.values() if len(child) == count]
    layers = lists.get("layers", fitting[0] if len(fitting) == 1 else None)
    if layers is None or not len(layers):
        raise UserError(f"{type(model).__name__} has no list of decoder layers.", where=where)
    return next(name for name, module in model.named_modules() if module is layers), layers


def _leave_towers(model: nn.Module, decoder: nn.Module, where: str) -> None:
    """Of the inner model of a vision-language one, keep the text decoder alone, under the name it has."""
    name = next(name for name, module in model.named_modules() if module is decoder)
    inner, _, leaf = name.rpartition(".")
    if not inner:  # config classes of language models may nest, too
        return
    if "." in inner:
        raise UserError(f"{type(model).__name__} keeps its language model too deep inside ({name}).", where=where)
    setattr(model, inner, TextOnly(leaf, decoder))


def _check_names(stored: StoredNames, state: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    made = next(((ours, theirs) for ours, theirs in stored.made.items() if ours in state), None)
    if made:
        what = f"transformers makes {made[0]} out of several tensors such as {made[1]}, which is not handled yet."
        raise UserError(what, where=str(checkpoint.path), remedy="Use a dense model.")
    twice = next(((ours, theirs) for ours, theirs in stored.twice.items() if ours in state), None)
    if twice:
        what = f"{stored.names[twice[0]]} and {twice[1]} are one tensor to transformers."
        raise UserError(what, where=str(checkpoint.path), remedy="Remove one of them.")


def stored_name(skeleton: Skeleton, name: str) -> str:
    """The name in the file of a parameter of the model; where the file has it not, the one that it would have."""
    if name in skeleton.stored:
        return skeleton.stored[name]
    prefix = f"{skeleton.layers_name}."
    return f"{skeleton.stored_layers_name}.{name.removeprefix(prefix)}" if name.startswith(prefix) else name


def check_shapes(skeleton: Skeleton, checkpoint: Checkpoint, codes: Mapping[str, tuple[str, int]]) -> None:
    """UserError where a parameter is missing from the headers, or has another shape there than the config asks for.

    `codes` are the weights stored under other names, by their names in 16 bits: that of the codes, and how many values
    one element of them holds.
    """
    problems = list(_expert_problems(skeleton, checkpoint, codes))
    aliases: dict[int, list[str]] = {}
    held = expert_parameters(skeleton)
    for ours, tensor in skeleton.model.state_dict(keep_vars=True).items():
        if ours in held:
            continue
        name = stored_name(skeleton, ours)
        aliases.setdefault(id(tensor), []).append(name)
        kept, packed = codes.get(name, (name, 1))
        problems += _other_shape(kept, checkpoint.tensors.get(kept), tuple(tensor.shape), packed)
    problems += [
        f"{names[0]} is missing"
        for names in aliases.values()  # a tied tensor is there once
        if not any(codes.get(name, (name, 1))[0] in checkpoint.tensors for name in names)
    ]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}.", where=str(checkpoint.path), remedy=MISMATCH_REMEDY)


def _expert_problems(skeleton: Skeleton, checkpoint: Checkpoint, codes: Mapping[str, tuple[str, int]]) -> Iterator[str]:
    for number, mixture in skeleton.experts.items():
        shapes = experts.shapes(skeleton.layers[number].get_submodule(mixture.module))
        for (_, role, parameter), relative in mixture.names.items():
            name = f"{skeleton.stored_layers_name}.{number}.{relative}"
            kept, packed = codes.get(name, (name, 1))
            found = checkpoint.tensors.get(kept) or skeleton.stacks.tensors.get(name)
            if found is None:
                yield f"{name} is missing"
            yield from _other_shape(kept, found, shapes[role, parameter], packed)


def _other_shape(name: str, found: TensorInfo | None, shape: tuple[int, ...], packed: int) -> Iterator[str]:
    """What is wrong with a tensor whose elements hold `packed` values of a weight of this shape each, if anything."""
    wanted = (*shape[:-1], -(-shape[-1] // packed)) if shape else ()
    if found is not None and found.shape != wanted:
        yield f"{name} has shape {list(found.shape)}, the config asks for {list(wanted)}"


def expert_parameters(skeleton: Skeleton) -> frozenset[str]:
    """The model's parameters that hold all experts of a layer."""
    names = {number: expert_parameters_of(skeleton, number) for number in skeleton.experts}
    return frozenset(f"{skeleton.layers_name}.{number}.{name}" for number, inside in names.items() for name in inside)


def linear_names(skeleton: Skeleton) -> dict[str, str]:
    """Every linear that runs on text: its module's name in the file -> in the model.

    Those of experts in 3-D parameters, which are no modules in the model, have names there of the same kind.
    """
    linears = [name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear)]
    found = {stored_name(skeleton, f"{name}.weight").removesuffix(".weight"): name for name in linears}
    for number, mixture in skeleton.experts.items():
        theirs, ours = f"{skeleton.stored_layers_name}.{number}", f"{skeleton.layers_name}.{number}.{mixture.module}"
        for (expert, role, parameter), name in mixture.names.items():
            if parameter == "weight":
                found[f"{theirs}.{name.removesuffix('.weight')}"] = f"{ours}.{expert}.{role}_proj"
    return found


def layer_names(skeleton: Skeleton, index: int) -> dict[str, str]:
    """Parameters and persistent buffers of decoder layer `index`, names relative to it: the file's -> the model's.

    Those of experts in 3-D parameters are left out.
    """
    ours, theirs = f"{skeleton.layers_name}.{index}.", f"{skeleton.stored_layers_name}.{index}."
    held = expert_parameters_of(skeleton, index)
    names = [name for name in skeleton.layers[index].state_dict() if name not in held]
    return {stored_name(skeleton, ours + name).removeprefix(theirs): name for name in names}


def expert_parameters_of(skeleton: Skeleton, index: int) -> frozenset[str]:
    """Parameters of decoder layer `index` that hold all its experts, by the model's names relative to it."""
    mixture = skeleton.experts.get(index)
    return frozenset() if mixture is None else _held(skeleton.layers[index], mixture.module)


def _held(layer: nn.Module, module: str) -> frozenset[str]:
    """Names, relative to a layer, of the parameters of its experts' `module`."""
    return frozenset(f"{module}.{parameter}" for parameter in experts.parameters(layer.get_submodule(module)))


def used_names(skeleton: Skeleton, index: int) -> frozenset[str]:
    """Names, as in the file and relative to the layer, of what decoder layer `index` needs.

    Files may hold more, such as rotary_emb.inv_freq, which transformers computes itself.
    """
    mixture = skeleton.experts.get(index)
    prefix = f"{skeleton.stored_layers_name}.{index}."
    stacks = {name.removeprefix(prefix) for name in skeleton.stacks.stacked if name.startswith(prefix)}
    return frozenset(layer_names(skeleton, index)) | stacks | frozenset(mixture.names.values() if mixture else ())


def module_names(skeleton: Skeleton, index: int) -> dict[str, str]:
    """Modules of decoder layer `index` with a weight, by names relative to it: the file's -> the model's."""
    suffix = ".weight"
    pairs = layer_names(skeleton, index).items()
    return {
        theirs.removesuffix(suffix): ours.removesuffix(suffix)
        for theirs, ours in pairs
        if theirs.endswith(suffix) and ours.endswith(suffix)
    }


@dataclass(frozen=True)
class ExpertBuffers:
    """Memory for a layer's routed experts, as its module holds them, filled expert by expert.

    `stacked` are the module's parameters by name relative to the layer; `per_expert` are views of single experts'
    tensors by the file's full names.
    """

    stacked: Mapping[str, Tensor]
    per_expert: Mapping[str, Tensor]
    skeleton: Skeleton

    def copy_in(self, name: str, tensor: Tensor) -> bool:
        """Copy a tensor of the file, of one expert or of all, into the buffers; False if it belongs to no expert."""
        if name in self.per_expert:
            self.per_expert[name].copy_(tensor)
            return True
        singles = self.skeleton.stacks.stacked.get(name, ())
        for single in singles:
            self.per_expert[single].copy_(part_of(self.skeleton.stacks.origins[single], tensor))
        return bool(singles)


def expert_buffers(skeleton: Skeleton, index: int, device: torch.device) -> ExpertBuffers:
    """Buffers for the routed experts of decoder layer `index`, empty ones if it has none."""
    mixture = skeleton.experts.get(index)
    if mixture is None:
        return ExpertBuffers({}, {}, skeleton)
    stacked, per_expert = experts.buffers(skeleton.layers[index].get_submodule(mixture.module), device)
    prefix = f"{skeleton.stored_layers_name}.{index}"
    return ExpertBuffers(
        {f"{mixture.module}.{name}": tensor for name, tensor in stacked.items()},
        {f"{prefix}.{mixture.names[key]}": part for key, part in per_expert.items()},
        skeleton,
    )


def resident_layer(skeleton: Skeleton, index: int, weights: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """A copy of decoder layer `index` with `weights` (names as in the file, relative to the layer) on `device`.

    Routed experts come as their module's parameters (`expert_buffers`).
    """
    layer = copy.deepcopy(skeleton.layers[index])
    ours = layer_names(skeleton, index)
    given = {ours.get(name, name): tensor for name, tensor in weights.items()}
    fill(layer, given, where=f"{skeleton.stored_layers_name}.{index}")
    return layer.to(device)


def fill(module: nn.Module, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Give `module` its parameters and persistent buffers, in the dtypes it declares; all must be there, no other."""
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in weights]
    unknown = [name for name in weights if name not in wanted]
    wrong = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    for names, problem in ((missing, "missing"), (unknown, "unknown to transformers"), (wrong, "of another shape")):
        if names:
            raise UserError(f"tensors {problem}: {', '.join(names[:5])}.", where=where, remedy=MISMATCH_REMEDY)
    cast = {name: weights[name].to(wanted[name].dtype) for name in wanted}
    module.load_state_dict(cast, strict=True, assign=True)
    module.requires_grad_(False)
    left = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.device.type == "meta"]
    if left:
        raise UserError(f"tensors without data: {', '.join(left[:5])}.", where=where)


def with_layers(skeleton: Skeleton, layers: list[nn.Module], weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the whole model around other layers; of the rest, `weights` (the model's names) are filled in.

    A tied weight has several names; `outer_weights` gives one tensor for all of them.
    """
    model = copy.deepcopy(skeleton.model, {id(skeleton.layers): nn.ModuleList(layers)})
    for name, tensor in weights.items():
        old = getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        if old.shape != tensor.shape:
            raise UserError(
                f"{stored_name(skeleton, name)} has shape {list(tensor.shape)}, the config asks for {list(old.shape)}.",
                remedy=MISMATCH_REMEDY,
            )
        put(model, name, tensor.to(old.dtype))
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

    A tied tensor is read once, under whichever name the file has it; `decoded` ones, by the file's names, are taken as
    given. `read` gives a tensor by its name in the file, by default on the CPU.
    """
    state = skeleton.model.state_dict(keep_vars=True)
    unused = {id(tensor) for module in _skipped(skeleton, head=head) for tensor in module.parameters()}
    names = {
        name: stored_name(skeleton, name)
        for name, tensor in state.items()
        if not name.startswith(skeleton.layers_name + ".") and (id(tensor) not in unused or _is_tied(state, name))
    }
    found: dict[int, Tensor] = {}
    for ours in state:
        theirs = stored_name(skeleton, ours)
        if decoded and theirs in decoded:
            found[id(state[ours])] = decoded[theirs]
    for ours, theirs in names.items():
        if theirs in checkpoint.tensors and id(state[ours]) not in found:
            found[id(state[ours])] = read(theirs) if read is not None else read_tensor(checkpoint, theirs)
    missing = [theirs for ours, theirs in names.items() if id(state[ours]) not in found]
    if missing:
        raise UserError(
            f"tensors missing: {', '.join(missing[:5])}.", where=str(checkpoint.path), remedy=MISMATCH_REMEDY
        )
    return {name: found[id(state[name])] for name in names}


def _skipped(skeleton: Skeleton, *, head: bool) -> list[nn.Module]:
    """Modules without which the other end of the model runs: the head, or the embeddings of tokens."""
    if head:
        return [*token_embeddings(skeleton.model).values()]
    output = skeleton.model.get_output_embeddings()  # type: ignore[operator]
    return [] if output is None else [output]


def _is_tied(state: dict[str, Tensor], name: str) -> bool:
    return sum(tensor is state[name] for tensor in state.values()) > 1


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
