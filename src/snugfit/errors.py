"""The one exception that a user's input can cause, and the stable codes that say which kind it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

MAX_PART_LENGTH = 2000  # characters of one part of a message

# code -> meaning; `docs/errors.md` is made from this table, and a test holds the two equal
CODES: Mapping[str, str] = {
    # what a caller asks for
    "option-invalid": "An option or argument has a value that it cannot have; the place names it.",
    "option-conflict": "Options exclude each other, or one has no effect beside another.",
    "option-missing": "An option that this call needs is not given.",
    "output-exists": "The output exists already.",
    "output-busy": "Another run is writing this output.",
    "output-not-writable": "The output cannot be created or written there.",
    "dependency-missing": "This needs an optional package that is not installed.",
    # what the machine has
    "device-unavailable": "The requested device does not exist on this machine.",
    "memory-insufficient": "The run needs more main memory than is free.",
    "gpu-memory-insufficient": "The run needs more GPU memory than is free.",
    "disk-insufficient": "The run needs more disk space than is free.",
    "rank-lost": "Another process of a run on several ranks ended, or cannot be reached.",
    # files
    "system-error": "The operating system refused to read or write (disk full, permission, a lost device).",
    "file-missing": "A required file does not exist.",
    "file-unreadable": "A file cannot be read, or is of another kind.",
    "file-outside-model": "A link or a file's name leads out of the model's directory.",
    "file-damaged": "A file ended early or changed while it was read.",
    "json-invalid": "A file is not valid JSON, or is another document.",
    "yaml-invalid": "A file is not valid YAML.",
    # a checkpoint's files
    "model-not-found": "There is no such directory, and no such model on the Hub.",
    "config-missing": "The model has no config.json.",
    "config-invalid": "A key of config.json has a value that it cannot have.",
    "weights-missing": "The model has no safetensors weights, or a shard or tensor is missing.",
    "weights-unsafe": "The weights are pickles, which can run code when they are loaded.",
    "header-invalid": "The header of a safetensors file is damaged.",
    "index-invalid": "The index of the shards is damaged, or does not belong to them.",
    "tensor-duplicate": "A tensor is stored twice.",
    "tensor-not-finite": "A tensor holds NaN or infinite values.",
    "config-mismatch": "config.json and the tensors describe different models.",
    # what can be run and quantized
    "architecture-unknown": "transformers has no architecture of this name.",
    "architecture-unsupported": "The architecture cannot be run layer by layer.",
    "cache-unknown": "The size of this architecture's KV cache is unknown.",
    "experts-unsupported": "The experts of this family cannot be calibrated.",
    "format-unverified": "No tested engine loads this format for this family.",
    "already-quantized": "The weights are quantized in a way from which no recipe can start.",
    "dtype-unsupported": "A tensor is stored in a dtype that has no reader.",
    "quantization-unknown": "The quantization of this checkpoint has no reader.",
    "quantization-invalid": "The quantization config and the tensors do not agree.",
    "scale-invalid": "A scale is missing, has a wrong shape, or is not a positive finite number.",
    # the Hub
    "hub-unreachable": "The Hub, or a file on it, cannot be reached.",
    "hub-refused": "The Hub refuses access.",
    "hub-changed": "A file on the Hub changed, or does not match its header.",
    "hub-answer-unusable": "The answer of the Hub, or of a proxy, is unusable.",
    "cache-not-writable": "The cache of downloaded files cannot be written.",
    # recipes
    "recipe-not-found": "There is no built-in recipe and no file of this name.",
    "recipe-invalid": "The recipe has an unknown key, a missing key or a wrong value.",
    "recipe-rule-missing": "No rule of the recipe names a tensor.",
    "recipe-rule-unmatched": "A rule of the recipe matches no tensor.",
    "recipe-splits-group": "The recipe splits weights that engines run as one.",
    "recipe-shape": "A weight's shape does not allow the format that the recipe gives it.",
    "recipe-not-quantizable": "The recipe gives a tensor a format that this tensor cannot have.",
    "recipe-changes-nothing": "The recipe quantizes nothing in this model.",
    "pattern-invalid": "A regular expression is invalid, or takes too long.",
    # calibration and texts
    "dataset-unreadable": "A file of a dataset cannot be read.",
    "dataset-invalid": "A sample of a dataset has the wrong form.",
    "dataset-too-small": "The dataset holds too little text.",
    "dataset-set-invalid": "A dataset's YAML has an unknown key, a wrong value, or a template that is not allowed.",
    "dataset-not-found": "There is no dataset, subset, split or revision of this name.",
    "token-out-of-range": "A token id is beyond the model's vocabulary.",
    "sequence-too-long": "Samples are longer than the positions of the model.",
    "tokenizer-unusable": "The model has no usable tokenizer.",
    "chat-template-failed": "The chat template refuses these messages.",
    "experts-uncovered": "Experts saw too few tokens to be calibrated.",
    "activations-not-finite": "Hidden states overflow or become NaN in a layer.",
    "amax-invalid": "A calibrated range is zero or not finite, so no scale can be computed.",
    "statistics-invalid": "A file of statistics is damaged or incomplete.",
    "statistics-mismatch": "Statistics are of another model, other samples or other settings.",
    # plans
    "scores-invalid": "A file of scores is damaged, or is of another version.",
    "plan-impossible": "No mix of formats keeps the budget and the constraints, or none is on the menu.",
    "scores-mismatch": "Scores are of another model, other samples or other settings, or lack a format.",
    # evaluation and its results
    "models-mismatch": "The models, or their tokenizers, cannot be compared token by token.",
    "reference-invalid": "A stored reference is damaged, or is of another version.",
    "reference-mismatch": "A stored reference was made for other texts or contexts.",
    "result-invalid": "A result file is damaged, is of another version, or is not a result.",
    "record-changed": "A record was changed after it was written, or has no digest.",
    "results-mismatch": "Two results have nothing in common that can be compared.",
    "task-unknown": "There is no benchmark task of this name.",
    "task-unusable": "A benchmark task cannot be loaded, or cannot be run here.",
    # a server
    "server-unreachable": "The server does not answer, or stopped answering.",
    "server-refused": "The server refuses access or this request.",
    "server-unsupported": "The server is of another kind, or cannot report log probabilities of a prompt.",
    "server-answer-invalid": "The server's answer is not of vLLM's form, or does not match the request.",
    "server-not-finite": "The served model computes NaN.",
    # resumption
    "run-differs": "The output holds an unfinished run with other inputs or settings.",
    "machine-differs": "The output holds an unfinished run of another machine, version or batch.",
    "run-damaged": "The files of an unfinished run are damaged.",
}


class UserError(Exception):
    """Bad input: `what` is wrong at `where`, `remedy` says what to do, `code` is stable and one of `CODES`.

    Messages name parameters in backticks (`max_seq_length`); the command line shows these as its options and exits
    with code 2.
    """

    def __init__(self, what: str, *, code: str, where: str = "", remedy: str = "") -> None:
        self.code = code
        self.what = plain(what)
        self.where = plain(where)
        self.remedy = plain(remedy)
        super().__init__(self.__str__())

    def at(self, where: str) -> Self:
        """The same error at another place."""
        return type(self)(self.what, code=self.code, where=where, remedy=self.remedy)

    def __str__(self) -> str:
        """The three parts in one line, the place first."""
        place = f"{self.where}: " if self.where else ""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{place}{self.what}{remedy}"


class Unfinished(UserError):  # noqa: N818  # it is one
    """A UserError that keeps what an unfinished run has done: a lost network, another machine than it began on."""


def plain(text: str, longest: int = MAX_PART_LENGTH) -> str:
    """`text` as a terminal may show it: unprintable characters escaped, the middle of a long text left out.

    Names and values out of a model's files could otherwise move the cursor, hide what follows, or fill the screen.
    """
    if len(text) > longest:
        text = f"{text[: longest * 3 // 4]} … {text[-longest // 4 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
