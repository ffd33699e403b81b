"""Why engines refuse a file: lines of their logs -> the reason in plain words, and what to do, as data.

The patterns are made from the raise statements of vLLM 0.24, 0.32 (Aphrodite's are the same), SGLang 0.5.23.
The first entry with a match in the log explains it, so that the cause comes before its consequences.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """A pattern of a log's line, what it means, and what to do about it."""

    pattern: re.Pattern[str]
    reason: str
    remedy: str


def _refusal(pattern: str, reason: str, remedy: str) -> Refusal:
    return Refusal(re.compile(pattern), reason, remedy)


REFUSALS: tuple[Refusal, ...] = (
    _refusal(
        r"(?:No module named|Error while finding module specification for) '?(?:vllm|sglang|aphrodite)",
        "the engine is not installed in that environment",
        "Give the interpreter of its environment as `python`, or a `command`.",
    ),
    _refusal(
        r"error: (?:unrecognized arguments|argument --)",
        "this version of the engine does not have one of the options, or not with that value",
        "Remove it from the engine's options; `--help` of the engine lists what it has.",
    ),
    _refusal(r"[Aa]ddress already in use", "another server has this port", "Leave `port` out, or choose a free one."),
    _refusal(
        r"Failed to infer device type|no CUDA-capable device|CUDA driver version is insufficient|No CUDA GPUs",
        "the engine finds no GPU that it can use",
        "Look at nvidia-smi and the driver's version; a build for CPUs is another package.",
    ),
    _refusal(
        r"Free memory on device .* is less than desired GPU memory utilization",
        "other processes hold memory of the GPU that the engine was to have",
        "Stop them, or lower `gpu_memory_utilization`.",
    ),
    _refusal(
        r"No available memory for the cache blocks",
        "the weights and what a batch needs fill the engine's share of the GPU: nothing is left for a KV cache",
        "Raise `gpu_memory_utilization`, lower --max-num-seqs or --max-num-batched-tokens, or use a smaller format.",
    ),
    _refusal(
        r"KV cache is needed, which is larger than the available KV cache memory|estimated maximum model length",
        "the KV cache of one sequence of this context does not fit beside the weights",
        "Lower `context`, use an FP8 KV cache, or raise `gpu_memory_utilization`.",
    ),
    _refusal(
        r"User-specified max_model_len .* is greater than|max_model_len .* greater than the derived",
        "the context is longer than what the model was made for",
        "Lower `context`.",
    ),
    _refusal(
        r"[Mm]odel [Aa]rchitectures? .* (?:is|are) not supported|has no vLLM implementation|Unsupported architectures",
        "this version of the engine has no code for the model's architecture",
        "Use a newer engine, or another one.",
    ),
    _refusal(
        r"does not recognize this architecture",
        "the engine's transformers is too old for this architecture",
        "Update transformers in the engine's environment.",
    ),
    _refusal(
        r"trust_remote_code|trust-remote-code",
        "the model brings Python code of its own, which the engine does not run unasked",
        "Read that code; if you trust it, add --trust-remote-code to the engine's options.",
    ),
    _refusal(
        r"Quantization scheme is not supported for the current GPU|is not supported for the current GPU",
        "this GPU is too old for one of the file's formats",
        "Use another format: `fit` with the GPU's name lists which formats have kernels on it.",
    ),
    _refusal(
        r"Failed to find a kernel that can implement|No .*[kK]ernel.* (?:found|available) for"
        r"|NotImplementedError: No .* backend|Unsupported weight strategy=",
        "the engine has no kernel for one of the file's formats on this device",
        "Use another format or engine: docs/engines.md has what loads where.",
    ),
    _refusal(
        r"different quantization schemes for",
        "weights that the engine runs as one are stored in different formats",
        "Quantize again with a recipe that does not split fused groups: `inspect` names them.",
    ),
    _refusal(
        r"No compressed-tensors compatible scheme was found|Activation-quantized float4 is only supported in",
        "the engine's reader of compressed-tensors does not know one of the file's formats",
        "Use a newer engine, or another format.",
    ),
    _refusal(
        r"Unknown quantization method|Quantization method .* not (?:supported|recognized)",
        "the engine does not know this way to store quantized weights",
        "Use a newer engine, or another one.",
    ),
    _refusal(
        r"not divisible by (?:weight quantization block|min_thread|group|the group|tensor parallel)",
        "a weight's side cannot be divided as its scales, or this number of GPUs, need it",
        "Use fewer GPUs, or a format with other groups: `fit` shows which are possible.",
    ),
    _refusal(
        r"There is no module or parameter named|weights were not initialized from checkpoint|KeyError: '[\w.]*layers\.",
        "the file's tensors do not have the names that the engine looks up",
        "Run `inspect` on the file; if it finds nothing, this engine's code for the family differs: report it.",
    ),
    _refusal(
        r"(?:torch\.)?OutOfMemoryError|CUDA out of memory|out of memory",
        "the GPU's memory did not suffice",
        "Lower `context`, --max-num-seqs or --max-num-batched-tokens, or use a smaller format.",
    ),
    _refusal(
        r"Failed to find C compiler|ninja.* not found|Could not find nvcc|Python\.h: No such file",
        "the engine compiles kernels when it starts, and a compiler or its headers are missing",
        "Install a C compiler and Python's headers, or start with --enforce-eager.",
    ),
    _refusal(
        r"Couldn't instantiate the backend tokenizer|Can't load tokenizer",
        "the engine cannot read the tokenizer",
        "Copy tokenizer.json and tokenizer_config.json of the original beside the weights.",
    ),
)
_ERROR = re.compile(r"^(?:.*\b)?(\w*(?:Error|Exception)\b.*)$")
_LONGEST = 300


def explain(log: str) -> tuple[str, Refusal | None]:
    """The line of a log that says why the engine did not start, and what it means; None where no pattern matches."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for refusal in REFUSALS:
        for line in lines:
            if refusal.pattern.search(line):
                return line[-_LONGEST:], refusal
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or ["the log is empty"])[-1][-_LONGEST:], None
