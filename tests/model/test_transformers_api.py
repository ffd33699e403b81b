"""The private names of transformers that snugfit uses exist, and do what snugfit expects."""

from __future__ import annotations

import importlib.metadata
import json
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import TINY
from helpers.tiny_mixtures import mixture_settings
from snugfit.model import transformers_api as api


def build(kind: str, **settings: object) -> torch.nn.Module:
    config = AutoConfig.for_model(kind, **settings)
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def test_the_installed_release_is_supported() -> None:
    """The installed transformers is within the bounds of pyproject.toml, between the releases in SEEN_IN."""
    installed = tuple(map(int, importlib.metadata.version("transformers").split(".")[:2]))
    seen = [tuple(map(int, release.split("."))) for release in api.SEEN_IN]
    assert seen[0] <= installed <= seen[-1], f"transformers {installed} is new: run the tests, then add it to SEEN_IN"
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    bound = next(entry for entry in project["project"]["dependencies"] if entry.startswith("transformers"))
    assert bound == "transformers>=5.17,<5.24"


def test_names_of_architectures() -> None:
    """model_type names are looked up in transformers' own table."""
    assert api.is_known_architecture("llama")
    assert not api.is_known_architecture("no-such-model")
    assert not api.is_known_architecture(None)


def test_the_auto_class_follows_the_config() -> None:
    """A text config gets the causal auto class, a vision-language one the class that knows it."""
    assert api.auto_class(AutoConfig.for_model("llama")).__name__ == "AutoModelForCausalLM"
    assert api.auto_class(AutoConfig.for_model("gemma3")).__name__ != "AutoModelForCausalLM"


def test_names_are_renamed_and_converted() -> None:
    """A dense file's names stay; those of single experts are converted into stacked parameters."""
    rename = api.renamer(build("llama", **TINY))
    assert rename("model.layers.0.mlp.up_proj.weight") == ("model.layers.0.mlp.up_proj.weight", False)
    mixture = build("qwen3_moe", **mixture_settings("qwen3_moe"))
    target, converted = api.renamer(mixture)("model.layers.0.mlp.experts.0.up_proj.weight")
    assert converted
    assert target in mixture.state_dict()


def test_the_experts_interface() -> None:
    """Experts in 3-D parameters can be replaced by a registered function, and keep their eager forward."""
    mixture = build("qwen3_moe", **mixture_settings("qwen3_moe"))
    found = [module for module in mixture.modules() if api.has_experts_interface(module)]
    assert found
    assert not any(api.has_experts_interface(module) for module in build("llama", **TINY).modules())
    api.use_experts(found[0], "eager")
    assert found[0].config._experts_implementation == "eager"  # type: ignore[union-attr]


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_a_config_chooses_no_implementation(key: str, tmp_path: Path) -> None:
    """What config.json asks for at any level (flash_attention_2 without the package) is ignored."""
    text = {"model_type": "qwen3_vl_moe_text", key: "flash_attention_2"}
    given = {"model_type": "qwen3_vl_moe", key: "flash_attention_2", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(given), encoding="utf-8")
    config = AutoConfig.from_pretrained(tmp_path)
    asked = [getattr(part, f"{name}_internal") for part in (config, config.text_config) for name in api.IMPLEMENTATIONS]
    assert "flash_attention_2" in asked
    api.ignore_implementations(config)
    for part in (config, config.text_config):
        assert [getattr(part, f"{name}_internal") for name in api.IMPLEMENTATIONS] == [None, None]


def test_the_dtype_plan_is_a_mapping() -> None:
    """What loading keeps in fp32 is a mapping from patterns to dtypes, empty for a plain family."""
    assert dict(api.dtype_plan(build("llama", **TINY), torch.bfloat16)) == {}


def test_attention_with_repeated_key_heads_is_put_back() -> None:
    """The switch of attention holds inside the block alone."""
    from transformers.integrations import sdpa_attention

    before = sdpa_attention.use_gqa_in_sdpa
    with api.repeated_key_heads():
        assert sdpa_attention.use_gqa_in_sdpa is not before
        assert not sdpa_attention.use_gqa_in_sdpa(None, None)
    assert sdpa_attention.use_gqa_in_sdpa is before
