"""Whether the output head is the embeddings: what config.json asks for, and what the file's own head says.

A file may hold a head of its own although config.json ties it. As in transformers 5 (`PreTrainedModel.tie_weights`) and
in vLLM (`ModelConfig.maybe_untie_word_embeddings`) that head counts if its values differ from the embeddings, and is a
copy if they are equal. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from snugfit.dialects.packed import WIDE, split_name
from snugfit.model.anatomy import is_prediction_head, is_tower
from snugfit.model.language_config import nested_language_keys
from snugfit.model.names import parse_name
from snugfit.storage.checkpoint import Checkpoint, have_same_bytes

_TIED = "tie_word_embeddings"
_WEIGHTS = frozenset({"weight", "weight_packed", "qweight"})
# model types that tie the head where config.json does not state it: data of transformers 5.23, which a test compares
TIED_BY_DEFAULT = frozenset(
    {
        *("aya_vision", "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot"),
        *("blenderbot-small", "blip", "blip_text_model", "bloom", "camembert", "cohere", "cohere2", "cohere2_moe"),
        *("cohere2_vision", "cohere_compass_text", "cpmant", "ctrl", "data2vec-text", "deepseek_vl"),
        *("deepseek_vl_hybrid", "diffusion_gemma", "diffusion_gemma_text", "electra", "ernie", "ernie4_5"),
        *("ernie4_5_moe", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "falcon", "falcon_mamba", "florence2", "gemma"),
        *("gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_assistant", "gemma4_text"),
        *("gemma4_unified", "gemma4_unified_assistant", "gemma4_unified_text", "got_ocr2", "gpt-sw3", "gpt2"),
        *("gpt_bigcode", "gpt_neo", "gpt_neox_japanese", "granite_docling", "granite_docling_text", "granite_swa"),
        *("hunyuan_vl", "hunyuan_vl_text", "hyperclovax_vision_v2", "internvl", "janus", "jetmoe", "kimi_k25"),
        *("kosmos-2", "kosmos-2.5", "kosmos_2_5_text_model", "kosmos_2_text_model", "lfm2", "lfm2_moe", "lfm2_vl"),
        *("lfm3", "lfm3_vl", "lighton_ocr", "mamba", "marian", "mbart", "megatron-bert", "minicpm3", "minicpm_ocr"),
        *("mistral3", "modernbert-decoder", "moss_transcribe_diarize", "mpt", "mvp", "openai-gpt", "opt", "ovis2"),
        *("paddleocr_vl", "paddleocr_vl_text", "paligemma", "pegasus", "plbart", "pp_chart2table", "prophetnet"),
        *("qwen2_5_omni_text", "qwen3_vl_moe_text", "recurrent_gemma", "roberta", "roberta-prelayernorm", "roc_bert"),
        *("roformer", "smollm3", "starcoder2", "t5gemma2", "trocr", "udop", "vaultgemma", "whisper", "xglm", "xlm"),
        *("xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "youtu", "zamba", "zamba2", "zaya"),
    }
)


@dataclass(frozen=True, kw_only=True)
class TiedEmbeddings:
    """`tied`: the output head is the embeddings.

    `copies` are names of heads that the file stores beside equal embeddings. `own_head` is the name of a head that
    differs from them although config.json ties it, "" without one.
    """

    tied: bool
    copies: frozenset[str] = frozenset()
    own_head: str = ""


def read_tied(checkpoint: Checkpoint, config: Mapping[str, Any], decoder: str) -> TiedEmbeddings:
    """Compare the head and the embeddings of a file whose config ties them; `config` is the language model's.

    Of a model on the Hub a few pieces of both are compared.
    """
    if not any(_ties(level) for level in (checkpoint.config, config)):
        return TiedEmbeddings(tied=False)
    heads, embeddings = _of_role(checkpoint, "lm_head", decoder), _of_role(checkpoint, "embed", decoder)
    if not heads or not embeddings:
        return TiedEmbeddings(tied=True)
    own = next((head for head in heads if not any(_is_copy(checkpoint, head, one) for one in embeddings)), "")
    return TiedEmbeddings(tied=not own, copies=frozenset() if own else frozenset(heads), own_head=own)


def _ties(config: Mapping[str, Any]) -> bool:
    stated = config.get(_TIED)
    return str(config.get("model_type")) in TIED_BY_DEFAULT if stated is None else bool(stated)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that no longer ties the output head, at no level that describes the language model."""
    changed = {**config, _TIED: False}
    for key in nested_language_keys(config):
        changed[key] = untied(config[key])
    return changed


def _of_role(checkpoint: Checkpoint, role: str, decoder: str) -> list[str]:
    """Names of the tensors with the weights of all modules of a role outside layers and towers."""
    found = []
    for name in checkpoint.tensors:
        module, suffix = split_name(name)
        if suffix not in _WEIGHTS or is_tower(name) or is_prediction_head(name):
            continue
        parsed = parse_name(f"{module}.weight", (1, 1), decoder)
        if parsed.layer is None and parsed.role == role:
            found.append(name)
    return found


def _is_copy(checkpoint: Checkpoint, head: str, embeddings: str) -> bool:
    """Whether two tensors hold the same plain values; codes are taken for different, as their scales may differ."""
    if not head.endswith(".weight") or not embeddings.endswith(".weight"):
        return False
    first, second = checkpoint.tensors[head], checkpoint.tensors[embeddings]
    alike = (first.dtype, first.shape) == (second.dtype, second.shape)
    return alike and first.dtype in WIDE and have_same_bytes(checkpoint, head, embeddings)
