"""transformers' model code without its weights: parameters on the meta device, checked against a checkpoint.

Of a vision-language model only what runs on text is kept. Names outside this module are those of the file;
`Skeleton.stored` maps transformers' names to them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from snugfit.dialects.packed import WIDE
from snugfit.errors import UserError
from snugfit.model import experts, transformers_api
from snugfit.model.conversion import StoredNames, list_name, stored_names
from snugfit.model.layer_stubs import TextOnly, alike, put, trace_layer_calls, why_not_passed_on
from snugfit.model.layout import ModelLayout
from snugfit.model.logical_weights import LogicalWeights, stacked_weights
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.safetensors_header import TensorInfo

# classes with an output head; others are classifiers, reward models and embedding models
_PREDICTS_TOKENS = re.compile(r"CausalLM|LMHead|ConditionalGeneration|ImageTextToText|Multimodal")
# what the names of scales of a tensor end in, behind the tensor's own name
_SCALES = ("_scale", "_scale_inv", "_scale_2", "_global_scale", "_zero_point", "_scales")
MISMATCH_REMEDY = "Config and weights do not belong together."


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """The names of one decoder layer's tensors and modules, in the file and in transformers' layer.

    `file_prefix` is what the names begin with in the file; all others are relative to the layer. `parameters` maps the
    file's names of parameters and persistent buffers to the module's, without experts in 3-D parameters. `used` are the
    file's names of everything that the layer needs; a file may hold more, such as rotary_emb.inv_freq, which
    transformers computes itself.
    """

    file_prefix: str
    parameters: Mapping[str, str]
    used: frozenset[str]

    @cached_property
    def modules(self) -> Mapping[str, str]:
        """The file's names of modules with a weight -> the layer's."""
        suffix = ".weight"
        return {
            file_name.removesuffix(suffix): name.removesuffix(suffix)
            for file_name, name in self.parameters.items()
            if file_name.endswith(suffix) and name.endswith(suffix)
        }


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A causal language model whose parameters have shapes but no data; its buffers are real.

    `layers_name` is the name of the decoder layers in the model, `stored_layers_name` in the file. `stored` maps names
    of the model's parameters and persistent buffers to those in the file (of a quantized weight: to its name in 16
    bits). Experts in 3-D parameters are in `experts` by layer instead; `stacks` has the logical weights of files that
    hold all experts of a layer in one tensor. With `returns_tuple` layers return tuples. With `carries_state` layers
    pass more on than hidden states, such as Gemma 4's shared keys and values, which are lost if a run starts at a later
    layer. Text does not run the layers `skipped`. A classifier, a reward model or an embedding model has no head that
    predicts tokens. `hidden_size` is how many values a hidden state has between layers, H: embeddings may be narrower.
    `why_not_run` says why its layers cannot run one after another, as Mamba's in 16 bits; weights alone can be read.
    """

    model: nn.Module
    layers: nn.ModuleList
    hidden_size: int
    layers_name: str
    stored_layers_name: str
    stored: Mapping[str, str]
    returns_tuple: bool
    carries_state: bool
    skipped: frozenset[int]
    why_not_run: str
    has_head: bool
    experts: Mapping[int, experts.ExpertNames]
    stacks: LogicalWeights

    @property
    def ran(self) -> tuple[int, ...]:
        """The numbers of the layers that text runs, in order."""
        return tuple(number for number in range(len(self.layers)) if number not in self.skipped)

    @property
    def config(self) -> Any:
        """transformers' config of the language model."""
        return self.model.config.get_text_config()  # type: ignore[union-attr,operator]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes."""
        found = self.model.dtype
        assert isinstance(found, torch.dtype)
        return found

    @property
    def is_causal(self) -> bool:
        """Whether no token sees a later one; embedding models may let tokens see all others."""
        sees_all = getattr(self.config, "use_bidirectional_attention", None) in (True, "all")
        return not sees_all and getattr(self.config, "is_causal", True) is not False

    def file_name(self, name: str) -> str:
        """The name in the file of a parameter of the model; if the file lacks it, the name that it would have."""
        if name in self.stored:
            return self.stored[name]
        prefix = f"{self.layers_name}."
        return f"{self.stored_layers_name}.{name.removeprefix(prefix)}" if name.startswith(prefix) else name

    def expert_parameters(self, index: int) -> frozenset[str]:
        """Parameters that hold all experts of decoder layer `index`, by the model's names relative to the layer."""
        mixture = self.experts.get(index)
        return frozenset() if mixture is None else _stacked_parameters(self.layers[index], mixture.module)

    def names_of_layer(self, index: int) -> LayerNames:
        """The names of decoder layer `index`."""
        prefix, file_prefix = f"{self.layers_name}.{index}.", f"{self.stored_layers_name}.{index}."
        stacked = self.expert_parameters(index)
        names = [name for name in self.layers[index].state_dict() if name not in stacked]
        parameters = {self.file_name(prefix + name).removeprefix(file_prefix): name for name in names}
        stacks = {name.removeprefix(file_prefix) for name in self.stacks.stacked if name.startswith(file_prefix)}
        mixture = self.experts.get(index)
        singles = frozenset(mixture.names.values() if mixture else ())
        return LayerNames(file_prefix=file_prefix, parameters=parameters, used=frozenset(parameters) | stacks | singles)

    def with_weight(self) -> dict[str, str]:
        """Modules with a weight that are no linears (embeddings, routers, norms): name in the file -> in the model."""
        suffix, linears = ".weight", set(self.linears().values())
        names = {key.removesuffix(suffix) for key in self.model.state_dict() if key.endswith(suffix)}
        return {self.file_name(name + suffix).removesuffix(suffix): name for name in names - linears}

    def linears(self) -> dict[str, str]:
        """Every linear that runs on text: its module's name in the file -> in the model.

        Experts in 3-D parameters, which are no modules in the model, get names of the same kind.
        """
        linears = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        found = {self.file_name(f"{name}.weight").removesuffix(".weight"): name for name in linears}
        for number, mixture in self.experts.items():
            file_prefix = f"{self.stored_layers_name}.{number}"
            module = f"{self.layers_name}.{number}.{mixture.module}"
            for (expert, role, parameter), name in mixture.names.items():
                if parameter == "weight":
                    found[f"{file_prefix}.{name.removesuffix('.weight')}"] = f"{module}.{expert}.{role}_proj"
        return found


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
    check_decoder(skeleton, layout)
    tensors, codes = layout.checkpoint.tensors, {}
    for name, origin in layout.weights.origins.items():
        if origin.part is None and origin.format is not None:
            stored = next(iter(origin.parts.values()))
            codes[name] = stored, origin.format.spec.codes.get(tensors[stored].dtype, 1)
    check_shapes(skeleton, layout.checkpoint, codes)
    return skeleton


def check_runs(skeleton: Skeleton, where: str) -> None:
    """UserError if samples cannot run through the layers."""
    if skeleton.why_not_run:
        raise _unsupported(f"{skeleton.why_not_run}.", where)


def check_decoder(skeleton: Skeleton, layout: ModelLayout) -> None:
    """UserError if transformers takes other layers of the file than the headers suggest."""
    if skeleton.stored_layers_name != layout.decoder:
        raise UserError(
            f"its decoder layers seem to be {layout.decoder}, but transformers takes {skeleton.stored_layers_name}.",
            code="config-mismatch",
            where=str(layout.checkpoint.path),
            remedy="Config and weights do not belong together, or this family needs a reader of its own.",
        )


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
    model = _build_model(checkpoint, dtype, where, own_head=layout.tied.own_head)
    stored = stored_names(model, checkpoint.tensors)
    has_head = not _is_headless(model, stored)
    if not has_head:
        _remove_head(model)
    decoder = model.get_decoder()  # type: ignore[operator]
    name, layers = _decoder_layers(model, decoder, where)
    _check_own_weights(decoder, name.rpartition(".")[2], where)
    tokens = _plain_tokens(model.config)
    skipped = layout.skipped_layers
    calls = trace_layer_calls(model, layers, tokens, where=where, skipped=skipped)
    first, call = next(iter(calls.calls.items()))
    if model.config.get_text_config() is not model.config:  # type: ignore[union-attr,operator]
        _keep_text_decoder(model, decoder, where)
        alone = trace_layer_calls(model, layers, tokens, where=where, skipped=skipped)
        if not all(alike(call, alone.calls[number]) for number, call in calls.calls.items()):
            raise _unsupported(f"{type(model).__name__} does not run text as its language model alone would.", where)
    why_not_run = why_not_passed_on(layers[first], call, model.dtype, returns_tuple=calls.returns_tuple)  # type: ignore[arg-type]
    mixtures = {n: module for n, layer in enumerate(layers) if (module := experts.find_experts(layer, where=where))}
    experts.use(model)
    stacked = {
        f"{name}.{n}.{inside}" for n, module in mixtures.items() for inside in _stacked_parameters(layers[n], module)
    }
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in stacked}
    _check_names(stored, state, checkpoint)
    names = {parameter: file_name for parameter, file_name in stored.names.items() if parameter in state}
    empty = [key for key, buffer in model.named_buffers() if buffer.device.type == "meta" and key not in state]
    if empty:
        raise _unsupported(f"this model never computes its buffers {', '.join(empty[:5])}.", where)
    passes_mapping = any(
        isinstance(value, MutableMapping) for _, _, given in calls.calls.values() for value in given.values()
    )
    file_layers = list_name(names, name, len(layers))
    stacks = stacked_weights(checkpoint, layout.dialect)
    singles = experts.single_experts(checkpoint, stacks, file_layers)
    return Skeleton(
        model=model,
        layers=layers,
        hidden_size=call[0].shape[-1],
        layers_name=name,
        stored_layers_name=file_layers,
        stored=names,
        returns_tuple=calls.returns_tuple,
        carries_state=passes_mapping and getattr(decoder.config, "num_kv_shared_layers", None) != 0,
        skipped=skipped,
        why_not_run=why_not_run,
        has_head=has_head,
        experts={n: experts.expert_names(layers[n], module, singles.get(n, {})) for n, module in mixtures.items()},
        stacks=stacks,
    )


def _unsupported(what: str, where: str) -> UserError:
    remedy = "This family needs a reader of its own: please report it."
    return UserError(what, code="architecture-unsupported", where=where, remedy=remedy)


def _plain_tokens(config: Any) -> Tensor:
    """Four times a token [1, 4] that stands for nothing but text."""
    special = {value for key, value in config.to_dict().items() if "token" in key and isinstance(value, int)}
    return torch.full((1, 4), next(token for token in range(len(special) + 1) if token not in special))


def _build_model(checkpoint: Checkpoint, dtype: torch.dtype | None, where: str, *, own_head: str) -> nn.Module:
    """transformers' model of config.json; with the file's `own_head`, which differs from the embeddings, untied."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        transformers_api.ignore_implementations(config)
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
            if own_head:
                part.tie_word_embeddings = False
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
            code="architecture-unsupported",
            where=where,
            remedy="Check the config, or update transformers.",
        ) from None
    if own_head and _is_tied(model):
        what = f"{own_head} differs from the embeddings, but {type(model).__name__} has no output head of its own."
        remedy = "Remove that tensor, if the embeddings are the head."
        raise UserError(what, code="config-mismatch", where=str(checkpoint.path), remedy=remedy)
    model.eval().requires_grad_(False)
    for pattern, kept in transformers_api.dtype_plan(model, arithmetic).items():
        for name, parameter in [*model.named_parameters()]:
            if re.search(pattern.replace("*", ".*"), name):
                put(model, name, parameter.to(kept))
    found: nn.Module = model
    return found


def _is_tied(model: nn.Module) -> bool:
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    return head is not None and head.weight is tokens.weight


def _is_headless(model: nn.Module, stored: StoredNames) -> bool:
    """Whether the file has no output head, as its class, one that predicts no tokens, explains."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    named = [str(name) for name in model.config.architectures or ()]  # type: ignore[union-attr]
    if not isinstance(head, nn.Module) or not named or any(_PREDICTS_TOKENS.search(name) for name in named):
        return False
    held = {id(tensor) for tensor in head.parameters()}
    state = model.state_dict(keep_vars=True)
    return not any(id(tensor) in held and name in stored.names for name, tensor in state.items())


def _remove_head(model: nn.Module) -> None:
    """Put nothing in the place of the output head: the model then gives hidden states."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    name = next(name for name, module in model.named_modules() if module is head)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())


def _decoder_layers(model: nn.Module, decoder: nn.Module, where: str) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers, called so in most families; else the only list of as many modules as layers."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)  # type: ignore[union-attr,operator]
    lists = {name: child for name, child in decoder.named_children() if isinstance(child, nn.ModuleList)}
    fitting = [child for child in lists.values() if len(child) == count]
    layers = lists.get("layers", fitting[0] if len(fitting) == 1 else None)
    if layers is None or not len(layers):
        raise _unsupported(f"{type(model).__name__} has no list of decoder layers.", where)
    return next(name for name, module in model.named_modules() if module is layers), layers


def _check_own_weights(decoder: nn.Module, layers: str, where: str) -> None:
    """UserError where transformers gives one decoder layer weights of another: layer by layer they would come apart."""
    tied = getattr(decoder, "_tied_weights_keys", None)
    for one, other in tied.items() if isinstance(tied, Mapping) else ():
        first, second = (name.split(".")[:2] for name in (one, other))
        if first[0] == second[0] == layers and first != second:
            raise _unsupported(f"its layers share weights: transformers takes {one} from {other}.", where)


def _keep_text_decoder(model: nn.Module, decoder: nn.Module, where: str) -> None:
    """Remove everything but the text decoder from the inner model of a vision-language one, under its own name."""
    name = next(name for name, module in model.named_modules() if module is decoder)
    inner, _, leaf = name.rpartition(".")
    if not inner:  # config classes of language models may nest, too
        return
    if "." in inner:
        raise _unsupported(f"{type(model).__name__} keeps its language model too deep inside ({name}).", where)
    setattr(model, inner, TextOnly(leaf, decoder))


def _check_names(stored: StoredNames, state: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """UserError for parameters that transformers merges out of several tensors, or finds twice in the file."""
    made = next((pair for pair in stored.made.items() if pair[0] in state), None)
    if made:
        what = f"transformers makes {made[0]} out of several tensors such as {made[1]}."
        raise _unsupported(what, str(checkpoint.path))
    twice = next((pair for pair in stored.twice.items() if pair[0] in state), None)
    if twice:
        raise UserError(
            f"{stored.names[twice[0]]} and {twice[1]} are one tensor to transformers.",
            code="tensor-duplicate",
            where=str(checkpoint.path),
            remedy="Remove one of them.",
        )


def check_shapes(skeleton: Skeleton, checkpoint: Checkpoint, codes: Mapping[str, tuple[str, int]]) -> None:
    """UserError if a parameter is missing from the headers, or has another shape there than config.json gives it.

    So is one that is stored narrower than 16 bits or beside a scale, and that nothing decodes.

    `codes` maps weights that are stored as codes, by their names in 16 bits, to the name of the codes and the number of
    values in one element of them.
    """
    _check_decoded(skeleton, checkpoint, codes)
    problems = list(_expert_problems(skeleton, checkpoint, codes))  # (code, what is wrong)
    aliases: dict[int, list[str]] = {}
    stacked = {
        f"{skeleton.layers_name}.{number}.{name}"
        for number in skeleton.experts
        for name in skeleton.expert_parameters(number)
    }
    for parameter, tensor in skeleton.model.state_dict(keep_vars=True).items():
        if parameter in stacked:
            continue
        name = skeleton.file_name(parameter)
        aliases.setdefault(id(tensor), []).append(name)
        stored, packed = codes.get(name, (name, 1))
        problems += _other_shape(stored, checkpoint.tensors.get(stored), tuple(tensor.shape), packed)
    problems += [
        ("weights-missing", f"{names[0]} is missing")
        for names in aliases.values()  # a tied tensor is in the file once
        if not any(codes.get(name, (name, 1))[0] in checkpoint.tensors for name in names)
    ]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        code, what = problems[0]
        raise UserError(f"{what}{more}.", code=code, where=str(checkpoint.path), remedy=MISMATCH_REMEDY)


def _check_decoded(skeleton: Skeleton, checkpoint: Checkpoint, codes: Mapping[str, tuple[str, int]]) -> None:
    """UserError for a parameter that would be taken at the face value of its codes, or without a scale that it has."""
    state = skeleton.model.state_dict(keep_vars=True)
    names = {skeleton.file_name(key) for key, tensor in state.items() if tensor.is_floating_point()}
    for number, mixture in skeleton.experts.items():
        names |= {f"{skeleton.stored_layers_name}.{number}.{relative}" for relative in mixture.names.values()}
    whole = {name for name in skeleton.stacks.stacked if checkpoint.tensors[name].dtype in WIDE}
    for name in sorted((names | whole) - codes.keys()):
        found = checkpoint.tensors.get(name)
        if found is None:
            continue
        if found.dtype not in WIDE:
            what = f"{name} is {found.dtype}, but nothing says how its codes are decoded."
            code = "dtype-unsupported"
        elif (
            scale := next((name + s for s in _SCALES if name + s in checkpoint.tensors and name + s not in names), "")
        ) != "":
            what = f"{scale} is a scale, but {name} is {found.dtype} and needs none."
            code = "scale-invalid"
        else:
            continue
        remedy = "Start from the original BF16, FP16 or FP32 checkpoint."
        raise UserError(what, code=code, where=str(checkpoint.path), remedy=remedy)


def _expert_problems(
    skeleton: Skeleton, checkpoint: Checkpoint, codes: Mapping[str, tuple[str, int]]
) -> Iterator[tuple[str, str]]:
    for number, mixture in skeleton.experts.items():
        shapes = experts.shapes(skeleton.layers[number].get_submodule(mixture.module))
        for (_, role, parameter), relative in mixture.names.items():
            name = f"{skeleton.stored_layers_name}.{number}.{relative}"
            kept, packed = codes.get(name, (name, 1))
            found = checkpoint.tensors.get(kept) or skeleton.stacks.tensors.get(name)
            if found is None:
                yield "weights-missing", f"{name} is missing"
            yield from _other_shape(kept, found, shapes[role, parameter], packed)


def _other_shape(name: str, found: TensorInfo | None, shape: tuple[int, ...], packed: int) -> Iterator[tuple[str, str]]:
    """What is wrong with a tensor whose elements hold `packed` values of a weight of this shape each, if anything."""
    wanted = (*shape[:-1], -(-shape[-1] // packed)) if shape else ()
    if found is not None and found.shape != wanted:
        yield "config-mismatch", f"{name} has shape {list(found.shape)}, but config.json gives it {list(wanted)}"


def _stacked_parameters(layer: nn.Module, module: str) -> frozenset[str]:
    """Names, relative to a layer, of the parameters of its experts' `module`, each of which holds all experts."""
    return frozenset(f"{module}.{parameter}" for parameter in experts.parameters(layer.get_submodule(module)))


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
