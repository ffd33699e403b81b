"""Train a tiny mixture of experts whose experts do specialise: a fixture for tests and measurements.

    python benchmarks/train_tiny_mixture.py OUT [--steps 2600] [--device cpu]
    python benchmarks/train_tiny_mixture.py OUT --measure-only   # figures of the model that OUT holds, nothing trained

A mixture made of copies of a dense MLP, or with a random router, hides what makes mixtures hard to quantize: text of
one kind reaches some experts and leaves others without a single sample. Here 16 small experts a layer, two of them a
token, learn eight kinds of bytes that have little in common. Two things make them specialise. Each step sees one row
of each kind, and the loss that balances the router is taken over the whole step: every expert must be used by some
kind, none by all. And that loss is small, so that the router is free to follow the text.

A token is a byte, plus an end of text between documents. The texts are public or made here: four novels by Jane Austen
(never Emma or Persuasion, which measurements use), the standard library's code, its documentation topics (the half
that snugfit calibrates on by default), Python's C headers, Unicode's names, and generated records, tables and numerals.
A document is held out where the first byte of its SHA-256 is under 26 (a tenth); of the topics, the other half is.

OUT gets the model in bf16, a tokenizer, held-out/KIND.txt and a README with the figures. On one kind of CPU the same
versions of Python, torch and transformers repeat the training, one thread, half an hour; another Python has another
library and other topics.
"""

# ruff: noqa: RUF001, S311 (Turkish has its own letters; random numbers keep no secrets)
from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import sysconfig
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snugfit.data.python_docs import python_topics

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from texts import novel

SEED = 0
CONTEXT = 512
PEAK_RATE = 4e-3
WARM_UP = 100
BALANCE = 0.01
HELD_OUT_BYTES = 16_000  # a kind
END = "<|endoftext|>"
NOVELS = ("mansfieldpark", "northangerabbey", "prideprejudice", "sensesensibility")
CONFIG: Mapping[str, Any] = {
    "vocab_size": 320,  # 256 bytes, the end of text, and room up to a multiple of 64
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "router_aux_loss_coef": BALANCE,
    "initializer_range": 0.06,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny mixture of experts that specialise.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2600, help="of 8 x 512 bytes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure-only", action="store_true", help="the model in OUT is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order
    training, held_out = split_texts()
    if not arguments.measure_only:
        write_held_out(held_out, arguments.out / "held-out")
        write_tokenizer(arguments.out)
        train(training, arguments.out, arguments.steps, arguments.device)
    figures = measure(arguments.out)
    trained_on = {kind: sum(len(text.encode()) for text in texts) for kind, texts in training.items()}
    (arguments.out / "README.md").write_text(describe(figures, trained_on), encoding="utf-8", newline="\n")
    print(json.dumps(figures))


# Texts


def split_texts() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Each kind's documents, to train on and held out."""
    training, held_out = {}, {}
    for kind, documents in KINDS.items():
        every = documents()
        if kind == "docs":
            training[kind], held_out[kind] = every, cut_text(python_topics("evaluation"))
        else:
            training[kind] = [text for text in every if not is_held_out(text)]
            held_out[kind] = [text for text in every if is_held_out(text)]
        content = "\n\n".join(training[kind]).encode()
        digest = hashlib.sha256(content).hexdigest()
        print(f"{kind}: {len(training[kind]):,} documents, {len(content):,} bytes to train on, SHA-256 {digest}")
    return training, held_out


def is_held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] < 26


def write_held_out(held_out: Mapping[str, list[str]], target: Path) -> None:
    """A file a kind, of shuffled documents up to a size: no long one takes it all."""
    target.mkdir(parents=True, exist_ok=True)
    for kind, documents in held_out.items():
        pieces = [piece for text in documents for piece in cut_text(text)]
        random.Random(SEED).shuffle(pieces)
        kept, size = [], 0
        for piece in pieces:
            if size + len(piece.encode()) <= HELD_OUT_BYTES:
                kept.append(piece)
                size += len(piece.encode()) + 2
        (target / f"{kind}.txt").write_text("\n\n".join(kept), encoding="utf-8", newline="\n")


def cut_text(text: str, size: int = 4000) -> list[str]:
    """Whole lines up to about `size` characters a piece."""
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > size:
            pieces.append(piece.strip("\n"))
            piece = ""
        piece += line
    return [text for text in (*pieces, piece.strip("\n")) if text]


def library_code() -> list[str]:
    """Modules of the standard library that are written by hand: no tests, no generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "encodings",
        "pydoc_data",
        "__pycache__",
    }
    files = (file for file in sorted(root.rglob("*.py")) if not left_out & set(file.relative_to(root).parts))
    return read_files(file for file in files if not file.name.startswith("_sysconfigdata"))


def c_headers() -> list[str]:
    files = sorted(Path(sysconfig.get_path("include")).rglob("*.h"))
    if not files:
        sys.exit("this Python has no C headers: install its development package")
    return read_files(file for file in files if file.name not in {"unicodename_db.h", "pyconfig.h"})


def read_files(files: Iterable[Path]) -> list[str]:
    return [text for file in files if (text := file.read_bytes().decode(errors="ignore").strip("\n"))]


def unicode_names() -> list[str]:
    """Characters of the first plane with code, category and name, 64 a document; not the ideographs, just numbered."""
    lines = []
    for code in range(0x20, 0xFFFF):
        name = unicodedata.name(chr(code), "")
        if name and "IDEOGRAPH-" not in name and "HANGUL SYLLABLE" not in name:
            lines.append(f"{chr(code)}\tU+{code:04X}\t{unicodedata.category(chr(code))}\t{name}")
    return ["\n".join(lines[start : start + 64]) for start in range(0, len(lines), 64)]


def json_records() -> list[str]:
    """Lists of orders, indented or on one line."""
    pick = random.Random("json")
    names = ("Ada", "Alan", "Barbara", "Donald", "Edsger", "Frances", "Grace", "John", "Katherine", "Radia", "Tony")
    goods = ("bolt", "bracket", "cable", "clamp", "gasket", "hinge", "lamp", "nut", "pump", "relay", "screw", "valve")

    def order() -> dict[str, Any]:
        lines: list[dict[str, Any]] = [
            {"item": pick.choice(goods), "quantity": pick.randint(1, 40), "price": round(pick.uniform(0.1, 90), 2)}
            for _ in range(pick.randint(1, 3))
        ]
        total = round(sum(line["quantity"] * line["price"] for line in lines), 2)
        customer = {"name": pick.choice(names), "member": pick.random() < 0.5, "discount": pick.choice((None, 5, 10))}
        return {"id": f"{pick.getrandbits(32):08x}", "customer": customer, "lines": lines, "total": total}

    return [json.dumps([order() for _ in range(8)], indent=pick.choice((None, 1, 2))) for _ in range(1000)]


def number_tables() -> list[str]:
    """Comma-separated random walks, each with its sums: digits and little else."""
    pick = random.Random("tables")

    def table() -> Iterator[str]:
        values = [pick.randint(10, 999) for _ in range(pick.randint(2, 4))]
        yield ",".join(["t", *"abcd"[: len(values)], "sum"])
        for time_ in range(60):
            values = [max(0, value + pick.randint(-9, 9)) for value in values]
            yield ",".join(map(str, (time_, *values, sum(values))))

    return ["\n".join(table()) for _ in range(1200)]


def turkish_numerals() -> list[str]:
    """Numbers in words: a small vocabulary with letters of two bytes."""
    pick = random.Random("turkish")
    ones = ("", "bir", "iki", "üç", "dört", "beş", "altı", "yedi", "sekiz", "dokuz")
    tens = ("", "on", "yirmi", "otuz", "kırk", "elli", "altmış", "yetmiş", "seksen", "doksan")

    def below_1000(number: int) -> list[str]:
        hundreds, rest = divmod(number, 100)
        start = [ones[hundreds], "yüz"] if hundreds > 1 else ["yüz"] * hundreds
        return [word for word in (*start, tens[rest // 10], ones[rest % 10]) if word]

    def words(number: int) -> str:
        thousands, rest = divmod(number, 1000)
        start = [*below_1000(thousands), "bin"] if thousands > 1 else ["bin"] * thousands
        return " ".join(start + below_1000(rest))

    def sentence() -> str:
        first, second = (pick.randint(1, 10 ** pick.randint(1, 6) - 1) for _ in range(2))
        relation = "büyüktür" if first > second else "küçüktür" if first < second else "eşittir"
        text = f"{words(first)} sayısı {words(second)} sayısından {relation}."
        return ("İ" if text[0] == "i" else text[0].upper()) + text[1:]

    return [" ".join(sentence() for _ in range(20)) for _ in range(1000)]


KINDS: Mapping[str, Callable[[], list[str]]] = {
    "novels": lambda: [piece for name in NOVELS for piece in cut_text(novel(name))],
    "code": library_code,
    "docs": lambda: cut_text(python_topics("calibration")),
    "headers": c_headers,
    "unicode": unicode_names,
    "json": json_records,
    "tables": number_tables,
    "turkish": turkish_numerals,
}


# Model


def write_tokenizer(target: Path) -> None:
    """A byte is a token: byte-level BPE without merges. Ids are the bytes themselves."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=byte_symbols(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, normalized=False)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(target)


def byte_symbols() -> dict[str, int]:
    """GPT-2's letter for each byte: itself where it is printable Latin-1, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)}


def train(training: Mapping[str, list[str]], target: Path, steps: int, device: str) -> None:
    """AdamW in fp32, one row of each kind a step, the rate warmed up and then down a cosine to nothing."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(SEED)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG)).to(device)
    model.set_experts_implementation("grouped_mm")
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    norms = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    streams = [join_documents(documents) for documents in training.values()]
    places = torch.Generator().manual_seed(SEED)
    start = time.monotonic()
    for step in range(1, steps + 1):
        rows = torch.stack([random_row(stream, places) for stream in streams]).to(device)
        output = model(input_ids=rows, output_router_logits=True, use_cache=False)
        losses = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none"
        ).mean(dim=1)
        (losses.mean() + BALANCE * balance_loss(output.router_logits)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == 1:
            parts = ", ".join(f"{kind} {loss:.2f}" for kind, loss in zip(training, losses.tolist(), strict=True))
            print(f"{step}/{steps} {time.monotonic() - start:.0f} s, {losses.mean():.3f}: {parts}", flush=True)
    model.to("cpu", torch.bfloat16).save_pretrained(target)


def join_documents(documents: Iterable[str]) -> Tensor:
    """One row of bytes, each document followed by the end of text."""
    tokens: list[int] = []
    for text in documents:
        tokens += [*text.encode(), CONFIG["eos_token_id"]]
    return torch.tensor(tokens, dtype=torch.int16)


def random_row(stream: Tensor, places: torch.Generator) -> Tensor:
    place = int(torch.randint(len(stream) - CONTEXT, (1,), generator=places))
    return stream[place : place + CONTEXT].long()


def balance_loss(router_logits: Iterable[Tensor]) -> Tensor:
    """Switch Transformer's, layer by layer: 1 where all experts get the same, more where few get most."""
    losses = []
    for logits in router_logits:
        chances = logits.float().softmax(dim=-1)
        used = torch.zeros_like(chances).scatter_(1, chances.topk(CONFIG["num_experts_per_tok"]).indices, 1.0)
        share = used.mean(dim=0) / CONFIG["num_experts_per_tok"]
        losses.append(CONFIG["num_experts"] * (share * chances.mean(dim=0)).sum())
    return torch.stack(losses).mean()


# Figures


@torch.no_grad()
def measure(target: Path) -> dict[str, Any]:
    """Held-out loss by kind, and how far the experts of each layer tell the kinds apart."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)  # the bf16 weights, exact arithmetic
    tokenizer = AutoTokenizer.from_pretrained(target)
    losses, chosen = {}, []
    for kind in KINDS:
        text = (target / "held-out" / f"{kind}.txt").read_text(encoding="utf-8")
        tokens = tokenizer(text, verbose=False).input_ids
        if tokens != list(text.encode()) or tokenizer.decode(tokens) != text:
            sys.exit(f"{kind}: the tokenizer does not give the bytes back")
        rows = torch.tensor(tokens[: len(tokens) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
        output = model(input_ids=rows, labels=rows, output_router_logits=False)
        losses[kind] = round(float(output.loss), 4)
        logits = torch.stack(model(input_ids=rows, output_router_logits=True).router_logits)
        chosen.append(logits.topk(CONFIG["num_experts_per_tok"]).indices)  # [layers, tokens, 2]
    shares = torch.stack([count_experts(experts) for experts in chosen], dim=1)  # [layers, kinds, experts]
    weights = target / "model.safetensors"
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "loss": losses,
        "mutual_information": [round(mutual_information(layer), 4) for layer in shares],
        "shuffled": [round(mutual_information(layer), 4) for layer in shuffled_shares(chosen)],
        "shares": {
            kind: [[round(share, 4) for share in layer] for layer in shares[:, place].tolist()]
            for place, kind in enumerate(KINDS)
        },
    }


def count_experts(experts: Tensor) -> Tensor:
    """The share of a layer's tokens that goes to each expert, [layers, experts], from choices [layers, tokens, 2]."""
    return torch.stack([torch.bincount(layer.flatten(), minlength=CONFIG["num_experts"]) for layer in experts]) / (
        experts[0].numel()
    )


def shuffled_shares(chosen: list[Tensor]) -> Tensor:
    """The same with the tokens dealt to the kinds at random: what chance alone would show."""
    every = torch.cat(chosen, dim=1)
    order = torch.randperm(every.shape[1], generator=torch.Generator().manual_seed(SEED))
    dealt = every[:, order].split([experts.shape[1] for experts in chosen], dim=1)
    return torch.stack([count_experts(experts) for experts in dealt], dim=1)


def mutual_information(shares: Tensor) -> float:
    """Between kind and expert in nats, each kind as frequent; `shares` is [kinds, experts], each row sums to 1."""
    shares = shares.double()
    ratio = shares / shares.mean(dim=0)
    return float(torch.where(shares > 0, shares * ratio.log(), 0.0).sum() / len(shares))


# README


def describe(figures: Mapping[str, Any], trained_on: Mapping[str, int]) -> str:
    """The fixture's README, with the figures as measured."""
    import transformers

    layers = range(CONFIG["num_hidden_layers"])
    information = figures["mutual_information"]
    best = information.index(max(information))
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}"
    texts = [
        [kind, SOURCES[kind], f"{trained_on[kind]:,}", f"{figures['loss'][kind]:.3f}"]
        + [str(sum(share < 0.01 for share in figures["shares"][kind][layer])) for layer in layers]
        for kind in KINDS
    ]
    contrast = [
        [kind, *(f"{100 * share:.0f}" if share >= 0.01 else "·" for share in figures["shares"][kind][best])]
        for kind in KINDS
    ]
    bare = [f"layer {layer}" for layer in layers]
    return README.format(
        experts=CONFIG["num_experts"],
        parameters=figures["parameters"],
        bytes=figures["bytes"],
        sha256=figures["sha256"],
        versions=versions,
        mean=sum(figures["loss"].values()) / len(KINDS),
        texts=markdown(["kind", "made from", "bytes trained on", "held-out loss", *bare], texts),
        information=markdown(
            ["", *bare],
            [["kind and expert, nats", *map(str, information)], ["kinds shuffled", *map(str, figures["shuffled"])]],
        ),
        most=math.log(len(KINDS)),
        best=best,
        contrast=markdown(["kind", *map(str, range(CONFIG["num_experts"]))], contrast),
    )


def markdown(head: list[str], rows: list[list[str]]) -> str:
    ruler = ["---"] * len(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ruler, *rows))


SOURCES: Mapping[str, str] = {
    "novels": "Mansfield Park, Northanger Abbey, Pride and Prejudice, Sense and Sensibility (public domain)",
    "code": "Python's standard library (PSF licence)",
    "docs": "Python's documentation topics, every other one (PSF licence)",
    "headers": "Python's C headers (PSF licence)",
    "unicode": "names of characters, from Python's unicodedata (Unicode licence)",
    "json": "made: orders in JSON",
    "tables": "made: random walks with sums, in CSV",
    "turkish": "made: numbers compared in Turkish words",
}

README = """# A tiny mixture of experts that specialise

Written by `python benchmarks/train_tiny_mixture.py tests/fixtures/tiny-mixture`, which says how it was trained and why
so: {versions}, one CPU thread. The same versions on the same
kind of CPU make the same weights (checked over 20 steps, bit for bit).

Qwen3MoeForCausalLM, a byte a token: 4 layers, hidden 128, 4 heads of 32 and 2 for keys and values, {experts} experts of
64 a layer, 2 a token; trained on rows of 512 bytes (rows of 1024 cost it up to 0.07 nats). {parameters:,} parameters
in bf16. `model.safetensors`: {bytes:,} bytes, SHA-256 `{sha256}`.

## Texts

What is held out was never trained on: of documents, those whose SHA-256 begins with a byte under 26 (a tenth); of the
documentation topics, the other half. `held-out/` has 14 to 16 kB of each kind under the same licence as its source.
Emma and Persuasion were not trained on at all.

Held-out loss is in nats a byte over windows of 512, bf16 weights in fp32 arithmetic; mean {mean:.3f}. The last columns
count the experts of a layer, of {experts}, that get under 1 % of a kind's tokens: calibrated on that kind alone, they
see next to nothing.

{texts}

## Who goes where

Mutual information of kind and expert over the held-out files, each kind as frequent; at most ln 8 = {most:.2f}.

{information}

Layer {best}, the share of each kind's choices that goes to each expert, in percent; a dot is under 1.

{contrast}
"""

if __name__ == "__main__":
    main()
