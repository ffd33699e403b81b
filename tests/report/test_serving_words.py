"""How a card says that an engine was tried: only what records or docs/engines.md have."""

from __future__ import annotations

from pathlib import Path

from helpers.report_runs import bench_record, quantize_record, serve_record
from snugfit.engines.tried import TRIED, seen_with
from snugfit.formats.spec import FORMATS
from snugfit.report.collection import Collection, Hub, KernelUse, QuantizedCheckpoint
from snugfit.report.serving_words import how_to_serve

ENGINES = (Path(__file__).parents[2] / "docs/engines.md").read_text(encoding="utf-8")


def test_what_was_seen_is_documented() -> None:
    """Every row names formats of the table and a version of docs/engines.md."""
    for row in TRIED:
        assert set(row.formats) <= set(FORMATS)
        assert row.version.partition(" ")[0] in ENGINES


def test_a_file_is_seen_only_if_all_its_formats_are() -> None:
    """One format that was not seen is enough to say nothing; a label is its format with options."""
    assert [one.version for one in seen_with("vllm", frozenset({"nvfp4", "mxfp4"}))] == ["0.24.0"]
    assert len(seen_with("vllm", frozenset({"int4-g128", "fp8-dynamic"}))) == 2
    assert [one.version for one in seen_with("vllm", frozenset({"nvfp4", "fp8-block"}))] == ["0.24.0"]
    assert seen_with("sglang", frozenset({"nvfp4"})) == []
    assert seen_with("vllm", frozenset({"nvfp4a16"})) == []  # not nvfp4


def test_tried_means_this_file() -> None:
    """A benchmark of the original, or of another file, does not count; a start that failed neither."""
    checkpoint = QuantizedCheckpoint(record=quantize_record(), kv_cache="fp8")
    found = Collection(checkpoints=(checkpoint,), benches=(bench_record(("made-up", "other")),), max_positions=4096)
    vllm, sglang, aphrodite, transformers = how_to_serve(found)
    assert vllm.tried == ()
    assert vllm.seen != ()
    assert vllm.text == "vllm serve made-up-hybrid --max-model-len 4096 --kv-cache-dtype fp8"
    assert sglang.text.endswith("--context-length 4096 --kv-cache-dtype fp8_e4m3")
    assert aphrodite.seen == ()
    assert transformers.seen == ("transformers 5.17 with compressed-tensors on a CPU",)
    use = KernelUse(engine="sglang", generation="Ada", format="nvfp4", kernel=None, arithmetic=None, seen=False)
    found = Collection(
        checkpoints=(checkpoint,), serves=(serve_record(),), kernels=(use,), hub=Hub(repo="me/made-up-hybrid")
    )
    vllm, sglang, *_ = how_to_serve(found)
    assert vllm.tried == ("0.24.0 on NVIDIA H100",)
    assert vllm.text == "vllm serve me/made-up-hybrid --kv-cache-dtype fp8"
    assert sglang.limits == ("no kernel is known for nvfp4 on Ada",)
