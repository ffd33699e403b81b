"""Faults of tokenizer, chat template and generation config: what is missing, and ends that no answer reaches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from snugfit.errors import UserError
from snugfit.inspection.evidence import Evidence, finding
from snugfit.records.doctor import Finding
from snugfit.storage.checkpoint import Checkpoint
from snugfit.storage.files import parse_json_object, read_file

TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model"),
    *("tokenizer.tiktoken", "qwen.tiktoken", "tiktoken.model", "sentencepiece.bpe.model"),
)
GENERATION, SETTINGS, TEMPLATE = "generation_config.json", "tokenizer_config.json", "chat_template.jinja"
VOCABULARY = "tokenizer.json"
READ = (GENERATION, SETTINGS, TEMPLATE, VOCABULARY)
MAX_BYTES = 50_000_000


def tokenizer(evidence: Evidence) -> Iterator[Finding]:
    """A checkpoint without any tokenizer."""
    names = evidence.checkpoint.other_files
    if evidence.small_files and not any(name in TOKENIZERS or name.endswith(".tiktoken") for name in names):
        what = f"none of {', '.join(TOKENIZERS[:3])} and the like: engines take token ids alone, if they start."
        yield from finding("tokenizer-missing", ["."], what, evidence.affected())


def special_tokens(evidence: Evidence) -> Iterator[Finding]:
    """Special tokens beyond the vocabulary, and tokens that end a generation and no answer."""
    if not evidence.small_files:
        return
    checkpoint = evidence.checkpoint
    generation = read_json(checkpoint, GENERATION)
    ends, place = _end_ids(generation), GENERATION
    if not ends:
        ends, place = _end_ids({**checkpoint.config, **evidence.layout.config}), "config.json"
    rows = [
        info.shape[0]
        for name, parsed in evidence.layout.names.items()
        if parsed.role == "embed" and len((info := evidence.layout.weights.tensors[name]).shape) == 2
    ]
    beyond = [number for number in ends if rows and not 0 <= number < max(rows)]
    if beyond:
        what = f"eos_token_id {beyond[0]} is beyond the {max(rows)} rows of the embeddings."
        yield from finding("token-out-of-range", [f"{place}: eos_token_id"], what, evidence.affected())
    yield from _ends(evidence, [number for number in ends if number not in beyond], place)


def _ends(evidence: Evidence, ends: list[int], place: str) -> Iterator[Finding]:
    """A finding where the chat template ends answers with a token, and no token of `ends` is in the template."""
    checkpoint = evidence.checkpoint
    settings = read_json(checkpoint, SETTINGS)
    template = _template(checkpoint, settings)
    if not template or not ends:
        return
    contents = _contents(checkpoint, settings)
    texts = [contents[number] for number in ends if number in contents]
    if len(texts) < len(ends) or any(text in template for text in texts):
        return
    end = _text_of(settings.get("eos_token"))
    # the template writes the tokenizer's own end, which is one of the ids that end a generation
    if "eos_token" in template and (end is None or end in texts):
        return
    if any(_pieces(text, template) for text in texts):
        return
    what = (
        f"a generation ends with {', '.join(map(repr, texts[:3]))}, and the chat template never writes it: an answer "
        "goes on without an end."
    )
    yield from finding("eos-never-emitted", [f"{place}: eos_token_id"], what, evidence.affected())


def _pieces(text: str, template: str) -> bool:
    """Whether a template may put a token together of its inner word: '<|' + 'im_end' + '|>'."""
    inner = text.strip("<|>[]_ ")
    return bool(inner) and inner != text and inner in template


def _end_ids(config: Mapping[str, Any]) -> list[int]:
    given = config.get("eos_token_id")
    numbers = given if isinstance(given, list) else [given]
    return [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]


def _template(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> str:
    """The text of all chat templates, "" without one."""
    try:
        return read_file(checkpoint.path, TEMPLATE, limit=MAX_BYTES).decode("utf-8", "replace")
    except (FileNotFoundError, UserError):
        given = settings.get("chat_template")
    if isinstance(given, list):
        texts = [entry.get("template") for entry in given if isinstance(entry, dict)]
        return "\n".join(text for text in texts if isinstance(text, str))
    return given if isinstance(given, str) else ""


def _contents(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[int, str]:
    """Id -> text of the special tokens that tokenizer.json or tokenizer_config.json list."""
    found: dict[int, str] = {}
    added = read_json(checkpoint, VOCABULARY).get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int) and isinstance(entry.get("content"), str):
            found[entry["id"]] = entry["content"]
    decoder = settings.get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        text = _text_of(entry)
        if text is not None and number.isascii() and number.isdecimal() and len(number) < 10:
            found[int(number)] = text
    return found


def _text_of(entry: object) -> str | None:
    """The text of a special token, given as text or as a mapping with its content."""
    given = entry.get("content") if isinstance(entry, dict) else entry
    return given if isinstance(given, str) else None


def read_json(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    """A small JSON file of the checkpoint, {} where it is missing or not readable."""
    try:
        return parse_json_object(read_file(checkpoint.path, name, limit=MAX_BYTES))
    except (FileNotFoundError, OSError, UserError, ValueError, RecursionError):
        return {}
