"""A tokenizer of single characters with a chat template, for tiny models; a text for it."""

from __future__ import annotations

import string
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)
PROSE = "The quick brown fox jumps over the lazy dog, and nobody minds it. " * 12


def add_tokenizer(directory: Path, letters: str = string.ascii_letters, template: str | None = TEMPLATE) -> Path:
    """Write a tokenizer of 59 single characters, with a chat template that knows no tools; gives `directory`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens = {token: place for place, token in enumerate(["<unk>", "<s>", "</s>", *letters, " ", "\n", ".", ","])}
    tokenizer = Tokenizer(models.WordLevel(tokens, names["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, chat_template=template).save_pretrained(directory)
    return directory
