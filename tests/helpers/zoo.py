"""Small checkpoints with one fault each, made on purpose out of sound ones: what `doctor` has to find.

A case edits a copy of a sound checkpoint. `damage` names the function that spoils it, `base` the sound one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import TINY
from helpers.fp8_sources import as_fp8
from helpers.packed_sources import as_packed
from helpers.tiny_families import all_tensors, random_rows, write_rows
from helpers.tiny_mixtures import make_mixture, rewrite
from helpers.tiny_tokenizer import add_tokenizer
from snugfit.dialects.compressed_tensors import quantization_config
from snugfit.formats.spec import TensorFormat
from snugfit.inspection.corrections import plain_linears
from snugfit.inspection.doctor import open_evidence
from snugfit.quantization.quantize import quantize

E4M3 = torch.float8_e4m3fn
INDEX = "model.safetensors.index.json"
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_key_value_heads": 4}
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
Q, O = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"  # noqa: E741
RECIPES = {
    "hybrid": "nvfp4-fp8-hybrid-fp8kv-four-over-six",
    "nvfp4": "nvfp4-four-over-six",
    "fp8": "fp8-dynamic",
    "int4": "int4-w4a16-absmax",
    "mxfp4": "mxfp4-absmax",
}


# what releases say and transformers' own configs do not
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "minimax_m2": {"scoring_func": "sigmoid", "use_routing_bias": True},
    "deepseek_v3": {"topk_method": "noaux_tc"},
}


class Patient:
    """A checkpoint that is edited: its tensors, config and files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Tensor] = all_tensors(path)
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))

    @property
    def quantization(self) -> dict[str, Any]:
        """The quantization config."""
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    def group(self, kind: str) -> dict[str, Any]:
        """The config group whose weights have this many bits and type, such as float-8."""
        groups: list[dict[str, Any]] = list(self.quantization["config_groups"].values())
        return next(g for g in groups if f"{g['weights']['type']}-{g['weights']['num_bits']}" == kind)

    def retarget(self, change: Mapping[str, TensorFormat | None]) -> None:
        """Write the config groups anew, some modules in another format or (None) in `ignore`."""
        formats = dict(open_evidence(self.path, ()).layout.formats)
        for module, fmt in change.items():
            formats.pop(module, None)
            if fmt is not None:
                formats[module] = fmt
        plain = [m for m, fmt in change.items() if fmt is None]
        ignore = [*plain_linears(open_evidence(self.path, ())), *plain]
        made = quantization_config(formats, [name for name in dict.fromkeys(ignore) if name not in formats])
        self.quantization.update({key: made[key] for key in ("config_groups", "format", "ignore")})

    def plain(self, module: str) -> None:
        """A weight in 16 bits in place of its codes."""
        parts = [name for name in self.tensors if name.startswith(f"{module}.")]
        codes = self.tensors.get(f"{module}.weight_packed", self.tensors.get(f"{module}.weight"))
        assert codes is not None
        columns = codes.shape[1] * (2 if codes.dtype == torch.uint8 else 8 if codes.dtype == torch.int32 else 1)
        for name in parts:
            del self.tensors[name]
        self.tensors[f"{module}.weight"] = torch.randn(codes.shape[0], columns).mul(0.05).bfloat16()

    def as_fp8(self, module: str) -> None:
        """Codes of FP8 under one scale an output channel in place of a plain weight."""
        weight = self.tensors.pop(f"{module}.weight").float()
        scale = (weight.abs().amax(1, keepdim=True) / 448).clamp(min=1e-6)
        self.tensors[f"{module}.weight"] = (weight / scale).to(E4M3)
        self.tensors[f"{module}.weight_scale"] = scale.bfloat16()

    def save(self, max_shard_size: str = "5GB") -> None:
        """Write tensors and config in place of the old ones."""
        rewrite(self.path, self.tensors, max_shard_size)
        (self.path / "config.json").write_text(json.dumps(self.config, indent=2), encoding="utf-8")


@dataclass(frozen=True)
class Case:
    """A fault: its code, the sound checkpoint, what spoils it, and how `doctor` is asked.

    With `edits_files` the function gets the directory and changes files; else it gets a Patient, which is saved then.
    `against` asks for a comparison with the source. `lossless` says that `repair` corrects it.
    """

    fault: str
    base: str
    damage: Callable[[Any], None]
    asked: Mapping[str, Any] = field(default_factory=dict, hash=False)
    edits_files: bool = False
    against: bool = False
    lossless: bool = False
    shards: str = "5GB"

    @property
    def name(self) -> str:
        """Fault and damage."""
        return f"{self.fault}-{self.damage.__name__}"


def make_sound(work: Path) -> dict[str, tuple[Path, Path]]:
    """Sound checkpoints by name, each with the model that it was made of."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**TINY, **WIDE}), dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0.0, 0.08)
        else:  # norms: engines fill missing ones with 1
            parameter.data.mul_(1.0 + 0.1 * torch.randn_like(parameter))
    model.save_pretrained(work / "llama")
    add_tokenizer(work / "llama")
    rows = write_rows(work / "rows.jsonl", random_rows([24] * 2, stop=59))
    found = {"plain": (work / "llama", work / "llama")}
    for name, recipe in RECIPES.items():
        quantize(work / "llama", recipe, output_dir=work / name, dataset=[rows], device="cpu")
        found[name] = work / name, work / "llama"
    found["hf"] = as_fp8(work / "llama", work / "hf", "hf-block"), work / "llama"
    found["modelopt"] = as_packed(work / "llama", work / "modelopt", "modelopt-nvfp4"), work / "llama"
    for family, recipe in (
        ("mixtral", "nvfp4-moe-four-over-six"),
        ("mixtral_int4", "fp8-int4-moe-absmax"),
        ("qwen3_moe", "fp8-dynamic"),
        ("granitemoe", "fp8-dynamic"),
        ("minimax_m2", "fp8-int4-moe-absmax"),
        ("deepseek_v3", "fp8-dynamic"),
        ("deepseek_v32", "fp8-dynamic"),
        ("jamba", "fp8-dynamic"),
    ):
        kind = family.removesuffix("_int4")
        made = make_mixture(kind, work / f"{family}-source", wide=kind != "jamba", **SETTINGS.get(kind, {}))
        source = add_tokenizer(made)
        quantize(source, recipe, output_dir=work / family, dataset=[rows], device="cpu")
        found[family] = work / family, source
    return found


def spoil(case: Case, sound: Path, target: Path) -> Path:
    """A copy of a sound checkpoint with the fault of a case."""
    shutil.copytree(sound, target)
    if case.edits_files:
        if case.shards != "5GB":
            Patient(target).save(case.shards)
        case.damage(target)
    else:
        patient = Patient(target)
        case.damage(patient)
        patient.save(case.shards)
    return target


# --- files


def _shards(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


def without_a_shard(path: Path) -> None:
    _shards(path)[1].unlink()


def cut_off(path: Path) -> None:
    file = _shards(path)[1]
    file.write_bytes(file.read_bytes()[:-100])


def no_header(path: Path) -> None:
    _shards(path)[1].write_bytes(b"\xff" * 64)


def in_two_shards(path: Path) -> None:
    first, second = _shards(path)[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file(load_file(second) | {name: torch.zeros_like(tensors[name])}, second, metadata={"format": "pt"})


def _index(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / INDEX).read_text(encoding="utf-8"))
    return found


def index_sends_elsewhere(path: Path) -> None:
    index = _index(path)
    names = [file.name for file in _shards(path)]
    name = next(name for name, file in index["weight_map"].items() if file == names[0])
    index["weight_map"][name] = names[1]
    (path / INDEX).write_text(json.dumps(index), encoding="utf-8")


def index_leaves_out(path: Path) -> None:
    index = _index(path)
    del index["weight_map"]["model.norm.weight"]
    (path / INDEX).write_text(json.dumps(index), encoding="utf-8")


def index_is_no_json(path: Path) -> None:
    (path / INDEX).write_text("{", encoding="utf-8")


def index_names_a_lost_norm(path: Path) -> None:
    index = _index(path)
    file = path / index["weight_map"]["model.layers.0.input_layernorm.weight"]
    tensors = load_file(file)
    del tensors["model.layers.0.input_layernorm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def consolidated_beside(path: Path) -> None:
    save_file({"output.weight": torch.zeros(2, 2)}, path / "consolidated.safetensors")


def loose_weights_beside(path: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(2)}, path / "old.safetensors")


def adapter_beside(path: Path) -> None:
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}', encoding="utf-8")


# --- config


def more_layers(patient: Patient) -> None:
    patient.config["num_hidden_layers"] += 1


def larger_vocabulary(patient: Patient) -> None:
    patient.config["vocab_size"] += 100


def stale_config(patient: Patient) -> None:
    patient.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def no_config(patient: Patient) -> None:
    del patient.config["quantization_config"]


def bits_in_words(patient: Patient) -> None:
    patient.group("float-4")["weights"]["num_bits"] = "four"


def unknown_argument(patient: Patient) -> None:
    patient.group("float-4")["weights"]["pack_factor"] = 8


def unknown_group_key(patient: Patient) -> None:
    patient.group("float-4")["kernel"] = "marlin"


def actorder_group(patient: Patient) -> None:
    patient.group("int-4")["weights"]["actorder"] = "group"


def actorder_true(patient: Patient) -> None:
    patient.group("int-4")["weights"]["actorder"] = True


def overlap(patient: Patient) -> None:
    patient.group("float-8")["targets"] = [*patient.group("float-8")["targets"], r"re:.*\.(mlp|self_attn)\..*"]


def untargeted_down(patient: Patient) -> None:
    group = patient.group("int-4")
    group["targets"] = [r"re:.*self_attn\..*", r"re:.*(gate|up)_proj$", "model.layers.1.mlp.down_proj"]


def ignored_although_stored(patient: Patient) -> None:
    patient.quantization["ignore"].append(DOWN)


def targets_in_file_names(patient: Patient) -> None:
    patient.group("int-4")["targets"] = [r"re:.*layers\.\d+\.block_sparse_moe\.experts\.\d+\.w[123]$"]


def needless_target(patient: Patient) -> None:
    patient.group("float-4")["targets"].append("re:.*never_there$")


def needless_ignore(patient: Patient) -> None:
    patient.quantization["ignore"] += ["model.layers.7.mlp.no_such_proj", "re:.*nothing$"]


def plain_down(patient: Patient) -> None:
    patient.plain(DOWN)


def another_format(patient: Patient) -> None:
    arguments = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    group = patient.group("float-8")
    group.update(weights=arguments, input_activations=None, format="pack-quantized")


# --- scales by headers


def no_weight_scale(patient: Patient) -> None:
    del patient.tensors[f"{DOWN}.weight_scale"]


def no_input_scale_of_an_expert(patient: Patient) -> None:
    name = next(name for name in patient.tensors if re.search(r"experts\.2\.w2\.input_global_scale", name))
    del patient.tensors[name]


def no_second_scale(patient: Patient) -> None:
    del patient.tensors[f"{DOWN}.weight_scale_2"]


def narrow_scale(patient: Patient) -> None:
    patient.tensors[f"{DOWN}.weight_scale"] = patient.tensors[f"{DOWN}.weight_scale"][:, :-1].contiguous()


def scale_of_a_plain_head(patient: Patient) -> None:
    patient.tensors["lm_head.weight_scale"] = torch.ones(64, 1)


def scale_without_weight(patient: Patient) -> None:
    patient.tensors["model.layers.0.mlp.old_proj.weight_scale"] = torch.ones(64, 1)


# --- groups


def plain_query(patient: Patient) -> None:
    patient.retarget({Q: None})
    patient.plain(Q)


def _experts(patient: Patient, number: int) -> list[str]:
    found = {n.rpartition(".")[0] for n in patient.tensors if f"layers.0.block_sparse_moe.experts.{number}." in n}
    return sorted(found)


def lost_expert(patient: Patient) -> None:
    for module in _experts(patient, 1):
        for name in [name for name in patient.tensors if name.startswith(f"{module}.")]:
            del patient.tensors[name]


def plain_expert(patient: Patient) -> None:
    patient.retarget(dict.fromkeys(_experts(patient, 1)))
    for module in _experts(patient, 1):
        patient.plain(module)


def renamed_experts(patient: Patient) -> None:
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for name in [name for name in patient.tensors if ".experts." in name]:
        new = re.sub(r"\.(w[123])\.", lambda match: f".{names[match[1]]}.", name)
        patient.tensors[new] = patient.tensors.pop(name)
    patient.group("int-4")["targets"] = [r"re:.*experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)$"]


def head_under_a_class(patient: Patient) -> None:
    """As llm-compressor writes a quantized head: the target is the class Linear."""
    patient.as_fp8("lm_head")
    patient.group("float-8")["targets"] = ["Linear"]
    patient.quantization["ignore"] = []


def stacked_experts(patient: Patient) -> None:
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            parts = [patient.tensors.pop(f"{prefix}.{number}.{leaf}.weight") for number in range(8)]
            scales = [patient.tensors.pop(f"{prefix}.{number}.{leaf}.weight_scale") for number in range(8)]
            patient.tensors[f"{prefix}.{leaf}"] = torch.stack([part.view(torch.uint8) for part in parts]).view(E4M3)
            patient.tensors[f"{prefix}.{leaf}_scale"] = torch.stack(scales)


# --- places


def quantized_router(patient: Patient) -> None:
    name = next(n.rpartition(".")[0] for n in patient.tensors if n.endswith("layers.0.block_sparse_moe.gate.weight"))
    patient.retarget({name: TensorFormat("fp8-dynamic")})
    patient.as_fp8(name)


def quantized_indexer(patient: Patient) -> None:
    name = next(n.rpartition(".")[0] for n in patient.tensors if n.endswith("indexer.weights_proj.weight"))
    patient.retarget({name: TensorFormat("fp8-dynamic")})
    patient.as_fp8(name)


def quantized_state_space(patient: Patient) -> None:
    name = next(n.rpartition(".")[0] for n in patient.tensors if n.endswith("mamba.x_proj.weight"))
    patient.retarget({name: TensorFormat("fp8-dynamic")})
    patient.as_fp8(name)


def quantized_embeddings(patient: Patient) -> None:
    patient.group("float-8")["targets"].append("model.embed_tokens")
    patient.as_fp8("model.embed_tokens")


def quantized_prediction(patient: Patient) -> None:
    name = next(n.rpartition(".")[0] for n in patient.tensors if n.endswith("eh_proj.weight"))
    patient.retarget({name: TensorFormat("fp8-dynamic")})
    patient.as_fp8(name)


def lost_prediction(patient: Patient) -> None:
    for name in [name for name in patient.tensors if name.startswith("model.layers.2.")]:
        del patient.tensors[name]
    patient.quantization["ignore"] = [n for n in patient.quantization["ignore"] if not n.startswith("model.layers.2.")]


def tied_with_own_head(patient: Patient) -> None:
    patient.config["tie_word_embeddings"] = True


# --- KV cache


def unread_cache_scales(patient: Patient) -> None:
    for name in [name for name in patient.tensors if name.endswith(("k_scale", "v_scale"))]:
        new = name.replace(".k_scale", ".key_cache_scale").replace(".v_scale", ".value_cache_scale")
        patient.tensors[new] = patient.tensors.pop(name)


def half_the_cache_scales(patient: Patient) -> None:
    del patient.tensors["model.layers.0.self_attn.v_scale"]


def undeclared_cache(patient: Patient) -> None:
    patient.quantization["kv_cache_scheme"] = None


def default_cache_scales(patient: Patient) -> None:
    for name in patient.tensors:
        if name.endswith(("k_scale", "v_scale")):
            patient.tensors[name] = torch.ones_like(patient.tensors[name])


# --- texts


def no_tokenizer(path: Path) -> None:
    for file in path.glob("token*"):
        file.unlink()


def _generation(path: Path, **values: Any) -> None:
    (path / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")


def end_beyond_the_vocabulary(path: Path) -> None:
    _generation(path, eos_token_id=[2, 70000])


def end_that_no_answer_has(path: Path) -> None:
    _generation(path, eos_token_id=0)


# --- hardware


def nothing(_patient: Patient) -> None:
    """A sound file, on hardware that cannot run it."""


# --- values


def zero_input_scale(patient: Patient) -> None:
    patient.tensors[f"{DOWN}.input_global_scale"].zero_()


def zero_block_scales(patient: Patient) -> None:
    patient.tensors[f"{DOWN}.weight_scale"].zero_()


def negative_scale(patient: Patient) -> None:
    patient.tensors[f"{DOWN}.input_global_scale"].neg_()


def nan_scale(patient: Patient) -> None:
    patient.tensors[f"{DOWN}.input_global_scale"].fill_(torch.nan)


def infinite_channel_scale(patient: Patient) -> None:
    patient.tensors[f"{DOWN}.weight_scale"][3] = torch.inf


def default_input_scale(patient: Patient) -> None:
    patient.tensors[f"{DOWN}.input_global_scale"].fill_(1.0)


def default_channel_scales(patient: Patient) -> None:
    patient.tensors[f"{DOWN}.weight_scale"].fill_(1.0)


def inverted_globals(patient: Patient) -> None:
    for name in patient.tensors:
        if name.endswith(".weight_global_scale"):
            patient.tensors[name] = patient.tensors[name].reciprocal()


def inverted_input_globals(patient: Patient) -> None:
    for name in patient.tensors:
        if name.endswith(".input_global_scale"):
            patient.tensors[name] = patient.tensors[name].reciprocal()


def inverted_second_scales(patient: Patient) -> None:
    for name in patient.tensors:
        if name.endswith(".weight_scale_2"):
            patient.tensors[name] = patient.tensors[name].reciprocal()


def huge_weight(patient: Patient) -> None:
    patient.tensors[f"{DOWN}.weight_scale"].mul_(1e5)


def nan_norm(patient: Patient) -> None:
    patient.tensors["model.norm.weight"][1] = torch.nan


def nan_codes(patient: Patient) -> None:
    patient.tensors[f"{DOWN}.weight"].view(torch.uint8)[0, 0] = 0x7F


def unlike_globals(patient: Patient) -> None:
    patient.tensors[f"{UP}.weight_global_scale"].mul_(2.0)


def unlike_input_globals(patient: Patient) -> None:
    patient.tensors[f"{UP}.input_global_scale"].mul_(2.0)


def unlike_experts(patient: Patient) -> None:
    for name in patient.tensors:
        if re.search(r"layers\.0.*experts\.2\.w2\.input_global_scale", name):
            patient.tensors[name].mul_(1.5)


# --- against the base


def changed_norm(patient: Patient) -> None:
    patient.tensors["model.norm.weight"].add_(0.25)


def double_weight(patient: Patient) -> None:
    patient.tensors[f"{DOWN}.weight_scale"].mul_(2.0)


def noise_in_codes(patient: Patient) -> None:
    patient.tensors[f"{DOWN}.weight_packed"].random_(0, 256)


def swapped_layers(patient: Patient) -> None:
    for suffix in ("weight_packed", "weight_scale", "weight_global_scale"):
        one, other = f"{DOWN}.{suffix}", f"model.layers.1.mlp.down_proj.{suffix}"
        patient.tensors[one], patient.tensors[other] = patient.tensors[other], patient.tensors[one]


def permuted_rows(patient: Patient) -> None:
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    for suffix in ("weight_packed", "weight_scale"):
        tensor = patient.tensors[f"{DOWN}.{suffix}"]
        patient.tensors[f"{DOWN}.{suffix}"] = tensor.view(torch.uint8)[order].view(tensor.dtype)


def lost_head(patient: Patient) -> None:
    del patient.tensors["lm_head.weight"]


def added_bias(patient: Patient) -> None:
    patient.tensors[f"{DOWN}.bias"] = torch.zeros(128, dtype=torch.bfloat16)


def other_theta(patient: Patient) -> None:
    patient.config["rms_norm_eps"] = 1e-3


def no_generation_config(path: Path) -> None:
    (path / "generation_config.json").unlink()


def other_template(path: Path) -> None:
    (path / "chat_template.jinja").write_text("{{ messages }}</s>", encoding="utf-8")


def folded(patient: Patient) -> None:
    """As a method that smooths would: a norm takes what the columns behind it give."""
    gains = torch.linspace(0.5, 2.0, 128)
    norm = patient.tensors["model.layers.0.input_layernorm.weight"]
    patient.tensors["model.layers.0.input_layernorm.weight"] = (norm.float() / gains).bfloat16()
    for leaf in ("q_proj", "k_proj", "v_proj"):
        module = f"model.layers.0.self_attn.{leaf}"
        values = patient.tensors[f"{module}.weight"].float() * patient.tensors[f"{module}.weight_scale"].float() * gains
        scale = values.abs().amax(1, keepdim=True) / 448
        patient.tensors[f"{module}.weight"] = (values / scale).to(E4M3)
        patient.tensors[f"{module}.weight_scale"] = scale.bfloat16()


def _cases() -> Iterator[Case]:
    sharded: dict[str, Any] = {"edits_files": True, "shards": "60KB"}
    yield Case("shard-missing", "nvfp4", without_a_shard, **sharded)
    yield Case("shard-damaged", "nvfp4", cut_off, **sharded)
    yield Case("shard-damaged", "nvfp4", no_header, **sharded)
    yield Case("tensor-twice", "nvfp4", in_two_shards, **sharded)
    yield Case("index-wrong", "nvfp4", index_sends_elsewhere, lossless=True, **sharded)
    yield Case("index-wrong", "nvfp4", index_leaves_out, lossless=True, **sharded)
    yield Case("index-wrong", "nvfp4", index_is_no_json, lossless=True, **sharded)
    yield Case("tensor-lost", "nvfp4", index_names_a_lost_norm, **sharded)
    yield Case("files-beside", "nvfp4", consolidated_beside, edits_files=True, lossless=True)
    yield Case("files-beside", "nvfp4", loose_weights_beside, edits_files=True, lossless=True)
    yield Case("files-beside", "nvfp4", adapter_beside, edits_files=True, lossless=True)
    yield Case("layers-missing", "nvfp4", more_layers)
    yield Case("config-mismatch", "nvfp4", larger_vocabulary)
    yield Case("config-stale", "plain", stale_config, lossless=True)
    yield Case("quantization-undeclared", "nvfp4", no_config)
    yield Case("quantization-undeclared", "hf", no_config)
    yield Case("quantization-invalid", "nvfp4", bits_in_words)
    yield Case("field-unknown", "nvfp4", unknown_argument, lossless=True)
    yield Case("field-unknown", "nvfp4", unknown_group_key, lossless=True)
    yield Case("order-removed", "int4", actorder_group)
    yield Case("order-removed", "int4", actorder_true)
    yield Case("targets-overlap", "hybrid", overlap, lossless=True)
    yield Case("target-missing", "int4", untargeted_down, lossless=True)
    yield Case("target-missing", "int4", ignored_although_stored, lossless=True)
    yield Case("target-not-looked-up", "minimax_m2", targets_in_file_names, lossless=True)
    yield Case("target-not-looked-up", "fp8", head_under_a_class, lossless=True)
    yield Case("target-unmatched", "nvfp4", needless_target, lossless=True)
    yield Case("ignore-unmatched", "nvfp4", needless_ignore, lossless=True)
    yield Case("ignore-incomplete", "fp8", plain_down, lossless=True)
    yield Case("ignore-incomplete", "hf", plain_down, lossless=True)
    yield Case("ignore-incomplete", "modelopt", plain_down, lossless=True)
    yield Case("format-mismatch", "hybrid", another_format)
    yield Case("scale-missing", "nvfp4", no_weight_scale)
    yield Case("scale-missing", "mixtral", no_input_scale_of_an_expert, {"engine": "vllm"})
    yield Case("scale-missing", "modelopt", no_second_scale)
    yield Case("scale-shape", "nvfp4", narrow_scale)
    yield Case("scale-extra", "nvfp4", scale_of_a_plain_head)
    yield Case("scale-extra", "nvfp4", scale_without_weight)
    yield Case("fused-formats-differ", "fp8", plain_query)
    yield Case("experts-missing", "mixtral_int4", lost_expert)
    yield Case("experts-mixed", "mixtral_int4", plain_expert)
    yield Case("experts-unread", "mixtral_int4", renamed_experts, lossless=True)
    yield Case("experts-stacked", "qwen3_moe", stacked_experts)
    yield Case("expert-scales-unread", "mixtral", nothing)
    yield Case("experts-not-stacked", "granitemoe", nothing)
    yield Case("unquantized-by-engine", "mixtral_int4", quantized_router)
    yield Case("unquantized-by-engine", "deepseek_v32", quantized_indexer)
    yield Case("unquantized-by-engine", "jamba", quantized_state_space)
    yield Case("embeddings-quantized", "fp8", quantized_embeddings)
    yield Case("prediction-quantized", "deepseek_v3", quantized_prediction)
    yield Case("prediction-lost", "deepseek_v3", lost_prediction)
    yield Case("head-differs", "nvfp4", tied_with_own_head, lossless=True)
    yield Case("kv-scale-unread", "hybrid", unread_cache_scales, lossless=True)
    yield Case("kv-scale-missing", "hybrid", half_the_cache_scales)
    yield Case("kv-scale-undeclared", "hybrid", undeclared_cache)
    yield Case("tokenizer-missing", "nvfp4", no_tokenizer, edits_files=True)
    yield Case("token-out-of-range", "nvfp4", end_beyond_the_vocabulary, edits_files=True)
    yield Case("eos-never-emitted", "nvfp4", end_that_no_answer_has, edits_files=True)
    yield Case("kernel-missing", "mxfp4", nothing, {"gpu": "H100", "engine": "sglang"})
    yield Case("shape-refused", "fp8", nothing, {"tensor_parallel_size": 3})
    yield from _value_cases()
    yield from _base_cases()


def _value_cases() -> Iterator[Case]:
    for how in ("all", "sample"):
        asked = {"values": how}
        yield Case("scale-zero", "nvfp4", zero_input_scale, asked)
        yield Case("scale-zero", "nvfp4", zero_block_scales, asked)
        yield Case("scale-negative", "nvfp4", negative_scale, asked)
        yield Case("scale-not-finite", "nvfp4", nan_scale, asked)
        yield Case("scale-not-finite", "fp8", infinite_channel_scale, asked)
        yield Case("scale-default", "nvfp4", default_input_scale, asked)
        yield Case("scale-default", "fp8", default_channel_scales, asked)
        yield Case("global-scale-inverted", "nvfp4", inverted_globals, asked, lossless=True)
        yield Case("global-scale-inverted", "nvfp4", inverted_input_globals, asked, lossless=True)
        yield Case("global-scale-inverted", "modelopt", inverted_second_scales, asked, lossless=True)
        yield Case("magnitude-implausible", "fp8", huge_weight, asked)
        yield Case("weight-not-finite", "nvfp4", nan_norm, asked)
        yield Case("weight-not-finite", "fp8", nan_codes, asked)
        yield Case("fused-scales-differ", "nvfp4", unlike_globals, asked)
        yield Case("fused-scales-differ", "nvfp4", unlike_input_globals, asked)
        yield Case("experts-scales-differ", "mixtral", unlike_experts, asked | {"engine": "vllm"})
        yield Case("kv-scale-default", "hybrid", default_cache_scales, asked)


def _base_cases() -> Iterator[Case]:
    for fault, base, damage in (
        ("base-kept-differs", "nvfp4", changed_norm),
        ("base-weight-far", "fp8", double_weight),
        ("base-weight-far", "nvfp4", noise_in_codes),
        ("base-swapped", "nvfp4", swapped_layers),
        ("base-permuted", "nvfp4", permuted_rows),
        ("base-tensor-lost", "nvfp4", lost_head),
        ("base-tensor-added", "nvfp4", added_bias),
        ("base-config-differs", "nvfp4", other_theta),
        ("base-folded", "fp8", folded),
    ):
        yield Case(fault, base, damage, against=True)
    yield Case("base-file-differs", "nvfp4", no_generation_config, edits_files=True, against=True)
    yield Case("base-file-differs", "nvfp4", other_template, edits_files=True, against=True)


CASES: tuple[Case, ...] = tuple(_cases())
