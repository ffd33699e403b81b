"""What config.json leaves out is what transformers fills in; models of an encoder and a decoder are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers.errors import raises
from snugfit.evaluation.evaluated_model import open_model
from snugfit.inspection.inspect import inspect
from snugfit.model.family_defaults import ENCODER_DECODERS, SIZES, SIZES_OF, TEXT_TYPES
from snugfit.model.language_config import with_defaults
from snugfit.planning.fit import fit
from snugfit.quantization.quantize import plan_quantization, quantize


def class_default(kind: str, key: str) -> int | None:
    """The default of a config class, under the name that it has there."""
    cls = CONFIG_MAPPING[kind]
    value = getattr(cls, getattr(cls, "attribute_map", {}).get(key, key), None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@pytest.mark.parametrize("kind", SIZES_OF)
def test_sizes_are_those_of_transformers(kind: str) -> None:
    """Every default size is the one of transformers' config class."""
    assert dict(zip(SIZES, SIZES_OF[kind], strict=True)) == {key: class_default(kind, key) for key in SIZES}


@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_text_models_are_those_of_transformers(kind: str) -> None:
    """The language model of a family of several parts is the one that transformers' config class makes."""
    assert TEXT_TYPES[kind] == AutoConfig.for_model(kind).get_text_config().model_type


def test_encoder_decoders_are_those_of_transformers() -> None:
    """Every family that transformers' config class calls an encoder-decoder is one, and no other."""
    found = set()
    for kind in CONFIG_MAPPING:
        try:
            config = AutoConfig.for_model(kind)
        except Exception:  # noqa: BLE001, S112 (classes that need arguments)
            continue
        if getattr(config, "is_encoder_decoder", False):
            found.add(kind)
    assert found == ENCODER_DECODERS


# configs that leave something out, as older releases do
SHORT: list[dict[str, Any]] = [
    {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}},  # as llava-1.5
    {"model_type": "llava", "text_config": {"max_position_embeddings": 4096}},
    {"model_type": "llava"},
    {"model_type": "gemma3", "text_config": {"hidden_size": 2560, "num_hidden_layers": 34}},
    {"model_type": "mllama", "text_config": {}},
    {"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16},
    {"model_type": "bloom", "n_layer": 70, "n_head": 112, "hidden_size": 14336},
    {"model_type": "bloom"},
    {"model_type": "gptj", "n_embd": 4096, "n_inner": None},
    {"model_type": "codegen", "n_layer": 20, "n_embd": 1024, "n_head": 16, "n_ctx": 2048, "n_positions": 2048},
    {"model_type": "codegen"},
    {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "max_seq_len": 2048},
    {"model_type": "mpt"},
    {"model_type": "gpt_neo", "num_layers": 24, "hidden_size": 2048, "num_heads": 16},
    {"model_type": "gpt2", "n_layer": 12},
    {"model_type": "xglm", "attention_heads": 16},
    {"model_type": "qwen3", "num_hidden_layers": 36},
    {"model_type": "olmo2"},
]


@pytest.mark.parametrize("given", SHORT, ids=lambda given: json.dumps(given)[15:60])
def test_short_configs_are_read_as_transformers_does(given: dict[str, Any]) -> None:
    """Layers, widths, heads and vocabulary that config.json leaves out, or calls otherwise, are transformers'."""
    text = with_defaults(given)
    config: Any = AutoConfig.for_model(**given).get_text_config()
    assert text["model_type"] == config.model_type
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        assert text[key] == getattr(config, key), key
    heads = text.get("num_key_value_heads") or text["num_attention_heads"]
    assert heads == (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def test_every_verb_refuses_an_encoder_decoder(tmp_path: Path) -> None:
    """An encoder-decoder is not supported, with that reason and not as a config to be corrected, by every verb."""
    sizes = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    config = AutoConfig.for_model("bart", vocab_size=64, encoder_attention_heads=4, decoder_attention_heads=4, **sizes)
    source = tmp_path / "model"
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(source)
    runs: list[Callable[[], object]] = [
        lambda: plan_quantization(source, "fp8-dynamic"),
        lambda: quantize(source, "fp8-dynamic", output_dir=tmp_path / "out"),
        lambda: fit(source, "16GiB"),
        lambda: open_model(source),
    ]
    for run in runs:
        with raises("architecture-unsupported", where=source / "config.json") as caught:
            run()
        assert "encoder-decoder" in caught.value.what
    found = inspect(source)
    assert any("encoder-decoder" in remark for remark in found.remarks)
    assert not found.problems
