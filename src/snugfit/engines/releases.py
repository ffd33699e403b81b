"""How engines read a checkpoint: what they refuse, and what they take without a word, as data with versions.

vLLM's facts are read from its releases 0.24.0, 0.32.0 and 0.33.0 (below vllm/model_executor: layers/quantization/
compressed_tensors/, layers/quantization/kv_cache.py, model_loader/default_loader.py, models/mixtral.py and the other
families'; vllm/config/model.py). SGLang's are read from 0.5.23, which pins compressed-tensors 0.18 (below
sglang/srt: layers/quantization/compressed_tensors/compressed_tensors.py and utils.py, model_loader/loader.py and
weight_utils.py, arg_groups/model_path_hook.py, models/llama.py, mixtral.py, olmoe.py, qwen3_moe.py). transformers' are
from 5.23 with compressed-tensors 0.20. `benchmarks/engine_facts.py` reads an installed engine again and prints what
differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from snugfit.engines.fused import LOOKED_UP_AS
from snugfit.engines.mixtures import EXPERTS_LOOKED_UP_AS

# keys of QuantizationArgs, which forbids others, in compressed-tensors 0.17 to 0.20
ARGUMENT_KEYS: frozenset[str] = frozenset(
    {
        *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
        *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
    }
)
# keys of QuantizationScheme, one config group, which forbids others; vLLM does not build this class
SCHEME_KEYS: frozenset[str] = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
# orders of columns with groups of their own, beside `true`
GROUP_ORDERS: frozenset[str] = frozenset({"group", "dynamic"})


@dataclass(frozen=True, kw_only=True)
class EngineRelease:
    """One release of an engine, and how it reads files.

    `kernels` is its name in engines/kernels.py, "" where it emulates. `compressed_tensors` is the release of that
    library that it has. With `forbids_scheme_keys` it checks the keys of config groups, with `forbids_argument_keys`
    those of their arguments. `refuses_group_order`: actorder "group" stops it. `drops_own_head`: a head that
    config.json ties is dropped although it differs from the embeddings. `head_by_name`: a target that is the class
    Linear does not reach the output head, which needs one of its name. `expert_leaves`: names under which it looks up
    the format of every family's gate, up and down, () for the file's. `refuses_unknown_experts`: expert tensors of
    unknown names stop it, they are not passed over (where families differ, False). `renames_experts`: families of
    EXPERT_NAMES whose experts it also reads under gate_proj, up_proj and down_proj; it looks up their format under the
    family's names. `stacked_experts`: families of which it looks for stacks of experts alone, also where experts are
    quantized one by one. `experts_without_global`: families whose experts in NVFP4 it reads without global scales.
    `loads_consolidated`: consolidated*.safetensors takes the place of the indexed files. `loads_loose`:
    without an index it loads every safetensors file at the top. `follows_index`: it looks up each tensor's file in the
    index, and does not read all tensors of all files that the index names.
    """

    name: str
    title: str
    kernels: str
    compressed_tensors: str
    forbids_argument_keys: bool
    forbids_scheme_keys: bool
    refuses_group_order: bool
    drops_own_head: bool
    head_by_name: bool
    expert_leaves: tuple[str, ...]
    refuses_unknown_experts: bool
    renames_experts: frozenset[str]
    loads_consolidated: bool
    loads_loose: bool
    follows_index: bool
    stacked_experts: frozenset[str] = frozenset()
    experts_without_global: frozenset[str] = frozenset()


_VLLM_033 = EngineRelease(
    name="vllm-0.33",
    title="vLLM 0.33",
    kernels="vllm",
    compressed_tensors="0.17",
    forbids_argument_keys=True,
    forbids_scheme_keys=False,
    refuses_group_order=True,
    drops_own_head=False,
    head_by_name=True,
    expert_leaves=(),
    refuses_unknown_experts=False,
    renames_experts=frozenset({"mixtral"}),
    loads_consolidated=True,
    loads_loose=True,
    follows_index=False,
)
_VLLM_032 = replace(_VLLM_033, name="vllm-0.32", title="vLLM 0.32")
_VLLM_024 = replace(
    _VLLM_033,
    name="vllm-0.24",
    title="vLLM 0.24",
    refuses_group_order=False,
    drops_own_head=True,
    head_by_name=True,
    expert_leaves=("gate_proj", "up_proj", "down_proj"),
    refuses_unknown_experts=True,
    renames_experts=frozenset(),
)
# SGLang's Mixtral and Qwen3-MoE pass over experts of unknown names, its OLMoE stops. A consolidated file is loaded
# beside the others only where no index and more files than model.safetensors are there
_SGLANG = EngineRelease(
    name="sglang",
    title="SGLang 0.5",
    kernels="sglang",
    compressed_tensors="0.18",
    forbids_argument_keys=True,
    forbids_scheme_keys=False,
    refuses_group_order=False,
    drops_own_head=True,
    head_by_name=True,
    expert_leaves=("gate_proj", "up_proj", "down_proj"),
    refuses_unknown_experts=False,
    renames_experts=frozenset(),
    loads_consolidated=False,
    loads_loose=True,
    follows_index=False,
)
# families whose experts transformers' conversion_mapping.py makes stacks of, one by one: DecompressExperts, which does
# that with codes, hands on codes and block scales alone (seen: qwen3_moe)
_STACKED_WHILE_READ: frozenset[str] = frozenset(
    {
        *("afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_ocr2", "deepseek_v2"),
        *("deepseek_v3", "deepseek_v32", "deepseek_v4", "dots1", "ernie4_5_moe", "ernie4_5_vl_moe", "exaone_moe"),
        *("flex_olmo", "flint", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm5_next_text"),
        *("glm_moe_dsa", "hunyuan_v1_moe", "hy_v3", "jamba", "kimi_k25", "kimi_linear", "kolibri1", "laguna"),
        *("lfm2_moe", "longcat_flash", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl"),
        *("mistral_large4_text", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text"),
        *("qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker"),
        *("qwen4_exp_text", "solar_open"),
    }
)
# families whose classes hold stacks, and for which conversion_mapping.py makes none (seen to be random: granitemoe,
# granitemoehybrid, granitemoe_swa, gemma4_text, qwen3_vl_moe_text)
_STACKED_IN_FILES: frozenset[str] = frozenset(
    {
        *("granitemoe", "granitemoehybrid", "granitemoeshared", "granitemoe_swa", "gemma4_text"),
        *("diffusion_gemma_text", "gpt_oss", "mistral4", "qwen3_vl_moe_text"),
    }
)
_TRANSFORMERS = EngineRelease(
    name="transformers",
    title="transformers 5 with compressed-tensors 0.20",
    kernels="",
    compressed_tensors="0.20",
    forbids_argument_keys=True,
    forbids_scheme_keys=True,
    refuses_group_order=True,
    drops_own_head=False,
    head_by_name=False,
    expert_leaves=(),
    refuses_unknown_experts=False,
    renames_experts=frozenset(),
    loads_consolidated=False,
    loads_loose=False,
    follows_index=True,
    stacked_experts=_STACKED_IN_FILES,
    experts_without_global=_STACKED_WHILE_READ,
)
RELEASES: Mapping[str, EngineRelease] = {
    release.name: release for release in (_VLLM_024, _VLLM_032, _VLLM_033, _SGLANG, _TRANSFORMERS)
}
# what a user may name besides the releases: an engine without a version stands for all its releases here
ENGINES: Mapping[str, tuple[str, ...]] = {
    "vllm": ("vllm-0.24", "vllm-0.32", "vllm-0.33"),
    **{name: (name,) for name in RELEASES},
}

# model_type -> (name of the module above `experts`, leaves of gate, down and up) under which engines read experts one
# by one; other names are refused (vLLM 0.24) or passed over without a word (0.32)
_MLP = ("mlp", ("gate_proj", "down_proj", "up_proj"))
EXPERT_NAMES: Mapping[str, tuple[str, tuple[str, str, str]]] = {
    "mixtral": ("block_sparse_moe", ("w1", "w2", "w3")),
    "phimoe": ("block_sparse_moe", ("w1", "w2", "w3")),
    "minimax_m2": ("block_sparse_moe", ("w1", "w2", "w3")),
    "lfm2_moe": ("feed_forward", ("w1", "w2", "w3")),
    "jamba": ("feed_forward", ("gate_proj", "down_proj", "up_proj")),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "qwen3_vl_moe_text"), _MLP),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "olmoe", "dots1"), _MLP),
    **dict.fromkeys(("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hunyuan_v1_moe"), _MLP),
}
# model_type -> names of parts of its layers in the file -> the names under which vLLM looks up formats of linears in
# them (engines/fused.py, engines/mixtures.py)
LOOKED_UP: Mapping[str, Mapping[str, str]] = {
    "minimax_m2": EXPERTS_LOOKED_UP_AS,
    "granitemoehybrid": {"mamba": LOOKED_UP_AS["mamba"]},
    "lfm2": {"conv": LOOKED_UP_AS["conv"]},
    "lfm2_moe": {"conv": LOOKED_UP_AS["conv"]},
}
# linears of multi-token prediction that are built without a quantization config (vLLM 0.32: deepseek_mtp.py,
# glm4_moe_mtp.py and others; DeepSeek's eh_proj is a torch.nn.Linear there)
PREDICTION_PLAIN: frozenset[str] = frozenset({"eh_proj"})
# families whose routers vLLM builds with a quantization config (0.24 and 0.32: qwen3_moe.py, lfm2_moe.py; seen to load
# in FP8); transformers' are no linears
ROUTERS_READ: frozenset[str] = frozenset({"qwen3_moe", "qwen3_vl_moe_text", "lfm2_moe"})
# the only formats of embeddings that vLLM loads: integers, weight-only, in groups or channels
EMBEDDING_FORMATS: frozenset[str] = frozenset({"int4", "int8"})
# of files in the layout of Mistral's own code
CONSOLIDATED = "consolidated"
