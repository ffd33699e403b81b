"""What `doctor` finds in a checkpoint: faults, who is affected, and what helps; and what `repair` changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from snugfit.records.base import as_json, without_nan
from snugfit.version import __version__

DOCTOR_SCHEMA = "snugfit.doctor/1"
REPAIR_SCHEMA = "snugfit.repair/1"
MAX_PLACES = 20  # that a finding lists

Severity = Literal["will not load", "will lie", "note"]
Verdict = Literal["sound", "will not load", "will lie"]


@dataclass(frozen=True)
class Fault:
    """A kind of fault: how bad it is, what it means, what to do; with `lossless` `repair` may correct it."""

    severity: Severity
    meaning: str
    remedy: str
    lossless: bool = False


_AGAIN = "Download the checkpoint again."
_REQUANTIZE = "Quantize the model again."
_REPAIR = "`repair` corrects it."
# code of a finding -> what it means; docs/doctor.md lists all, and a test holds the two equal
FAULTS: Mapping[str, Fault] = {
    # files
    "shard-missing": Fault("will not load", "A shard that the index names does not exist.", _AGAIN),
    "shard-damaged": Fault("will not load", "A shard is cut off, or its header is damaged.", _AGAIN),
    "tensor-twice": Fault("will lie", "Two shards hold a tensor of the same name: the last one read counts.", _AGAIN),
    "tensor-lost": Fault("will lie", "The index names a tensor that no shard holds and the model needs.", _AGAIN),
    "index-wrong": Fault(
        "will not load", "The index cannot be read, sends tensors elsewhere, or leaves some out.", _REPAIR, True
    ),
    "files-beside": Fault(
        "will lie", "Engines load other weights beside the quantized ones, or in their place.", _REPAIR, True
    ),
    # config.json
    "config-mismatch": Fault(
        "will not load",
        "config.json and the tensors describe different models.",
        "Take config.json and weights of one model.",
    ),
    "layers-missing": Fault(
        "will lie", "config.json states layers that the files do not have: engines fill them with nothing.", _AGAIN
    ),
    "config-stale": Fault(
        "will not load", "config.json states a quantization, and every weight is plain.", _REPAIR, True
    ),
    "quantization-undeclared": Fault(
        "will lie", "Weights are stored quantized, and no config says how.", "Add the quantization_config of its tool."
    ),
    "quantization-invalid": Fault(
        "will not load", "The quantization config has a value that it cannot have.", "Correct the config."
    ),
    "field-unknown": Fault(
        "will not load", "The quantization config has a key that compressed-tensors forbids.", _REPAIR, True
    ),
    "order-removed": Fault(
        "will not load", "actorder is a kind that engines have removed: groups in an order of their own.", _REQUANTIZE
    ),
    "targets-overlap": Fault(
        "will not load",
        "Two config groups of different formats target one weight, and engines disagree.",
        _REPAIR,
        True,
    ),
    "target-missing": Fault(
        "will not load", "A weight is stored quantized, and no target of the config names it.", _REPAIR, True
    ),
    "target-not-looked-up": Fault(
        "will not load",
        "A target matches the file's name, and not the name under which an engine looks.",
        _REPAIR,
        True,
    ),
    "target-unmatched": Fault("note", "A target matches no weight of the file.", _REPAIR, True),
    "ignore-incomplete": Fault(
        "will lie", "A weight is plain, and the config targets it: engines cast it to codes, or refuse.", _REPAIR, True
    ),
    "ignore-unmatched": Fault("note", "An entry of `ignore` names nothing in the file.", _REPAIR, True),
    "format-mismatch": Fault(
        "will not load", "The config gives a weight another format than its tensors have.", _REQUANTIZE
    ),
    # scales, from headers
    "scale-missing": Fault(
        "will lie", "A scale is missing: engines take memory that nothing was written to.", _REQUANTIZE
    ),
    "scale-shape": Fault("will not load", "A scale has a shape or dtype that does not fit its codes.", _REQUANTIZE),
    "scale-extra": Fault(
        "will not load",
        "A scale belongs to a plain weight, or to one that is missing.",
        "Remove it, or quantize again.",
    ),
    # groups
    "fused-formats-differ": Fault(
        "will not load", "Weights that engines run as one product are stored in different formats.", _REQUANTIZE
    ),
    "experts-missing": Fault("will lie", "Experts are missing or incomplete, or more than config.json states.", _AGAIN),
    "experts-mixed": Fault(
        "will lie", "Experts of one layer differ in format: engines look at the first alone.", _REQUANTIZE
    ),
    "experts-unread": Fault("will lie", "Experts have names that no engine reads.", _REPAIR, True),
    "experts-stacked": Fault(
        "will lie", "Codes of all experts are in one 3-D tensor, which engines read of no such file.", _REQUANTIZE
    ),
    "expert-scales-unread": Fault(
        "note",
        "An engine leaves out the global scales of experts in NVFP4, of any file: what it computes is nonsense.",
        "Run it in another engine; such experts in FP8, INT4 and MXFP4 are read right.",
    ),
    "experts-not-stacked": Fault(
        "note",
        "An engine looks for stacks of experts alone, and engines that read codes want them one by one.",
        "Run it in another engine.",
    ),
    # places
    "unquantized-by-engine": Fault(
        "will not load", "Engines build this weight in 16 bits alone, and it is stored quantized.", _REQUANTIZE
    ),
    "embeddings-quantized": Fault(
        "will not load", "The embeddings are quantized in a format that engines do not load.", _REQUANTIZE
    ),
    "prediction-quantized": Fault(
        "note",
        "A linear of multi-token prediction is quantized, and engines build it in 16 bits.",
        "Serve it without speculative decoding of its own, or quantize it again.",
    ),
    "prediction-lost": Fault(
        "note",
        "config.json states layers of multi-token prediction, and the file has none.",
        "Serve it without speculative decoding of its own, or set their number to 0.",
    ),
    "head-differs": Fault(
        "will lie", "config.json ties the output head to the embeddings, and the file's head differs.", _REPAIR, True
    ),
    # KV cache
    "kv-scale-unread": Fault(
        "will not load", "A scale of the KV cache has a name that no engine reads.", _REPAIR, True
    ),
    "kv-scale-missing": Fault(
        "will lie", "The config declares an FP8 KV cache, and layers have no scales: engines take 1.0.", _REQUANTIZE
    ),
    "kv-scale-undeclared": Fault(
        "note", "The file has scales of a KV cache, and the config declares none.", "Add kv_cache_scheme to use them."
    ),
    # tokenizer and its files
    "tokenizer-missing": Fault(
        "will not load", "The checkpoint has no tokenizer.", "Copy the tokenizer's files of the original."
    ),
    "token-out-of-range": Fault(
        "will lie", "A special token's id is beyond the vocabulary.", "Take the original's generation_config.json."
    ),
    "eos-never-emitted": Fault(
        "will lie",
        "No token that ends a generation is one that the chat template ends an answer with.",
        "Add the template's end token to eos_token_id in generation_config.json.",
    ),
    # hardware
    "kernel-missing": Fault(
        "will not load", "An engine has no kernel for a format on this GPU.", "Use another engine or format."
    ),
    "shape-refused": Fault(
        "will not load", "A weight cannot be split over these GPUs in its format.", "Use another number of GPUs."
    ),
    # values
    "scale-zero": Fault("will lie", "A scale is zero, so the weight or its inputs are.", _REQUANTIZE),
    "scale-negative": Fault("will lie", "A scale is negative.", _REQUANTIZE),
    "scale-not-finite": Fault("will lie", "A scale is NaN or infinite.", _REQUANTIZE),
    "scale-default": Fault("will lie", "A scale is 1.0, as it is before it is calibrated.", _REQUANTIZE),
    "global-scale-inverted": Fault(
        "will lie", "A global scale is a multiplier where the format has a divisor, or the reverse.", _REPAIR, True
    ),
    "magnitude-implausible": Fault(
        "will lie", "A dequantized weight is far larger or smaller than weights are.", _REQUANTIZE
    ),
    "weight-not-finite": Fault("will lie", "A plain weight or codes hold NaN or infinity.", _AGAIN),
    "fused-scales-differ": Fault(
        "will lie", "Weights that engines run as one product have different global scales: one is taken.", _REQUANTIZE
    ),
    "experts-scales-differ": Fault(
        "note", "Experts of one layer have different scales of inputs, which some back ends collapse.", _REQUANTIZE
    ),
    "kv-scale-default": Fault("will lie", "Every scale of the KV cache is 1.0: it was not calibrated.", _REQUANTIZE),
    # against the base
    "base-kept-differs": Fault(
        "will lie", "A tensor that is not quantized differs from the base's.", "Copy it from the base."
    ),
    "base-weight-far": Fault(
        "will lie", "A quantized weight is further from the base's than its format explains.", _REQUANTIZE
    ),
    "base-swapped": Fault("will lie", "A weight is another one of the base's.", _REQUANTIZE),
    "base-permuted": Fault("will lie", "The rows of a weight are the base's in another order.", _REQUANTIZE),
    "base-folded": Fault(
        "note",
        "Scales were folded between weights of a layer: only the whole shows what that cost.",
        "Compare the models by `evaluate`.",
    ),
    "base-tensor-lost": Fault("will lie", "A weight of the base is not in the checkpoint.", _REQUANTIZE),
    "base-tensor-added": Fault("note", "The checkpoint has a weight that the base does not have.", "Check where from."),
    "base-config-differs": Fault(
        "will lie", "config.json describes another model than the base's.", "Take the values of the base's config.json."
    ),
    "base-file-differs": Fault(
        "note", "A tokenizer, chat template or generation config is missing, or not the base's.", "Copy the base's."
    ),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault at one or more places.

    `fault` is its code, a key of FAULTS. `where` is the first place, `places` are all of them, in a record the first of
    `count`. `affected` are engines by title, on a GPU where that matters. With `repairable` `repair` corrects it.
    """

    fault: str
    severity: Severity
    where: str
    what: str
    affected: tuple[str, ...]
    remedy: str
    repairable: bool
    count: int = 1
    places: tuple[str, ...] = ()

    def listed(self) -> Finding:
        """As records list it: with its first places alone."""
        return replace(self, places=self.places[:MAX_PLACES])


@dataclass(frozen=True, kw_only=True)
class DoctorRecord:
    """What `doctor` found, and what it looked at.

    `engines` are titles, `values` is "none", "sample" or "all", `values_read` the number of weights whose values were
    read, `compared` that of tensors compared with those of `base`. `errors` lists, for quantized weights compared, the
    relative error by format: (format, weights, median, largest, name of that). `not_checked` says in words what was
    not looked at.
    """

    model: str
    revision: str | None
    method: str
    formats: Mapping[str, int]
    engines: tuple[str, ...]
    gpu: str | None
    tensor_parallel_size: int
    values: str
    base: str | None
    tensors: int
    values_read: int
    compared: int
    errors: tuple[tuple[str, int, float, float, str], ...]
    findings: tuple[Finding, ...]
    not_checked: tuple[str, ...]
    snugfit: str = __version__
    schema: str = DOCTOR_SCHEMA

    @property
    def verdict(self) -> Verdict:
        """The worst that was found; notes do not count."""
        found = {finding.severity for finding in self.findings}
        return "will not load" if "will not load" in found else "will lie" if "will lie" in found else "sound"

    @property
    def exit_code(self) -> int:
        """0 where it is sound, 1 where it will not load or will lie."""
        return 0 if self.verdict == "sound" else 1

    def to_json(self) -> str:
        """The record, one JSON document."""
        found: dict[str, Any] = without_nan(asdict(self))
        return as_json({"schema": found.pop("schema"), "verdict": self.verdict, **found}, allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class RepairRecord:
    """What `repair` changed: faults that it corrected, those that are left, and what became of the files.

    `renamed` counts tensors under new names, `rewritten` are shards that were written anew, `linked` those that share
    their bytes with the source, `left_out` files that were not taken over.
    """

    model: str
    repaired: tuple[Finding, ...]
    left: tuple[Finding, ...]
    dialect: str
    renamed: int
    rewritten: tuple[str, ...]
    linked: tuple[str, ...]
    left_out: tuple[str, ...]
    snugfit: str = __version__
    schema: str = REPAIR_SCHEMA

    def to_json(self) -> str:
        """The record, one JSON document."""
        return as_json(asdict(self))
