"""Fuzz cases: what is damaged, and the commands that read it. A case is decided by its target's name and its number."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz.bases import (
    BASES,
    DIALECTS,
    SHARDED,
    SINGLE,
    WORDS,
    Base,
    dump_header,
    framed,
    header_of,
    size_of,
    write_shard,
)
from fuzz.mutate import TEXTS, Raw, dump, nasty, spoil_bytes, spoil_json, spoil_yaml
from helpers.sparse_models import SIZES, Tensor

SEED = 1
Command = list[str]


@dataclass(frozen=True)
class Target:
    """One kind of damage. `make` writes a case into an empty directory, with what `shared` has, and gives commands.

    `cases` are run by `make fuzz`; a `heavy` one reads weights, and so needs torch.
    """

    make: Callable[[random.Random, Path, Path], list[Command]]
    cases: int
    heavy: bool = False


def rng_of(target: str, number: int) -> random.Random:
    """What decides a case."""
    return random.Random(f"{SEED} {target} {number}")  # noqa: S311  # not for secrets


def _with_digest(rng: random.Random, raw: bytes) -> bytes:
    """A damaged record, mostly with the digest of what it now holds, so that what reads its fields sees the damage."""
    from snugfit.records.base import DIGEST, content_digest

    if rng.random() < 0.2:
        return raw
    try:
        changed = json.loads(raw)
        changed[DIGEST] = content_digest(changed)
        return dump(changed).encode("utf-8", "surrogatepass")
    except (AttributeError, ValueError, TypeError, RecursionError):
        return raw


def _verbs(rng: random.Random, model: Path) -> list[Command]:
    """Everything that reads headers alone."""
    inspect = ["inspect", str(model)]
    fit = ["fit", str(model), "--gpu", rng.choice(("16GiB", "RTX 5090", "H100", "4GiB"))]
    recipes = "nvfp4-four-over-six", "fp8-dynamic", "int4-w4a16-absmax", "nvfp4-fp8-hybrid-fp8kv-four-over-six"
    for recipe in rng.sample(recipes, rng.choice((0, 1, 1, 1, 2))):
        fit += ["-r", recipe]
    fit += rng.choice(([], [], ["--tp", "2"], ["--context", "8k"], ["--engine", "sglang"], ["--engine", "aphrodite"]))
    plan = [
        "quantize",
        str(model),
        "-r",
        rng.choice(("nvfp4-four-over-six", "fp8-block", "nvfp4-fp8-hybrid-fp8kv-four-over-six", "int4-w4a16-absmax")),
    ]
    plan += ["--dry-run", *rng.choice(([], ["-o", str(model.parent / "out")]))]
    commands = [inspect, fit, plan]
    # tables take their time
    return [[*command, "--json"] if rng.random() < 0.8 else command for command in commands]


# --- headers


def make_header(rng: random.Random, root: Path, _shared: Path) -> list[Command]:
    """A weight file whose header is damaged: as bytes, as JSON, in its offsets, or sound but of odd tensors."""
    base = rng.choice(list(DIALECTS.values()) if rng.random() < 0.7 else list(BASES.values()))
    tensors = list(base.shards[0])
    model = base.write(root / "model")
    size = size_of(tensors)
    kind = rng.randrange(10)
    header = header_of(tensors)
    if kind < 2:
        front = spoil_bytes(rng, dump_header(header))
    elif kind < 4:
        names = ("__metadata__", "dtype", "shape", "data_offsets", *SIZES, *header)
        front = framed(spoil_json(rng, header, names))
    elif kind < 6:
        front = framed(dump(_moved(rng, header)).encode("utf-8", "surrogatepass"))
    elif kind == 6:
        front = _lied(rng, dump_header(header))
        size = rng.choice((size, size - 1, size + 1, 0, size // 2))
    else:
        odd = _odd_tensors(rng, tensors)
        front, size = dump_header(header_of(odd)), size_of(odd)
    write_shard(model / SINGLE, front, max(0, size))
    return _verbs(rng, model)


def _moved(rng: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """Entries whose dtype, shape or place is another."""
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2, 5))):
        entry, other = header[rng.choice(names)], header[rng.choice(names)]
        kind = rng.randrange(5)
        if kind == 0:
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        elif kind == 1:
            entry["data_offsets"] = [place + rng.choice((-1, 1, 8, 2**40, -(2**40))) for place in entry["data_offsets"]]
        elif kind == 2:
            entry["data_offsets"] = other["data_offsets"]
        elif kind == 3:
            entry["dtype"] = rng.choice((*SIZES, "F4", "BF17", "bf16", ""))
        else:
            entry["shape"] = rng.choice((other["shape"], entry["shape"][::-1], [*entry["shape"], 1], [], [0], [1] * 70))
    if rng.random() < 0.2:
        header[rng.choice(names)][rng.choice(("data_offsets", "shape", "dtype"))] = nasty(rng)
    return header


def _lied(rng: random.Random, front: bytes) -> bytes:
    """A length of the header that is not its own."""
    length = len(front) - 8
    lie = rng.choice(
        (0, 1, 2, length - 1, length + 1, length // 2, length * 2, 2**31, 2**32, 2**63, 2**64 - 1, 10**8, 10**8 + 1)
    )
    return struct.pack("<Q", lie) + front[8 : 8 + rng.choice((length, length, min(length, lie)))]


def _odd_tensors(rng: random.Random, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that make a sound file, and perhaps no model."""
    found = list(tensors)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(found)) if found else 0
        name, dtype, shape = found[at] if found else ("x", "BF16", (1,))
        kind = rng.randrange(8)
        if kind == 0 and found:
            del found[at]
        elif kind == 1:
            found[at : at + 1] = [(name, rng.choice(list(SIZES)), shape)]
        elif kind == 2:
            sides = list(shape) or [1]
            sides[rng.randrange(len(sides))] = rng.choice((0, 1, 2, 3, 7, 15, 48, 100, 10**6, 2**31))
            found[at : at + 1] = [(name, dtype, tuple(sides))]
        elif kind == 3:
            found[at : at + 1] = [
                (name, dtype, rng.choice(((), (0,), (1,), (0, 0), (*shape, 2), shape[1:], (1, *shape))))
            ]
        elif kind == 4:
            found[at : at + 1] = [(_odd_name(rng, name), dtype, shape)]
        elif kind == 5:
            found.append((_odd_name(rng, name), dtype, shape))
        elif kind == 6:
            suffix = rng.choice(
                (
                    "weight_scale",
                    "weight_scale_inv",
                    "weight_packed",
                    "qweight",
                    "scales",
                    "g_idx",
                    "weight_shape",
                    "W_q",
                    "k_scale",
                    "input_scale",
                    "weight._data",
                    "gate_up_proj_blocks",
                    "gate_up_proj_scales",
                    "weight.quant_state.bitsandbytes__nf4",
                    "SCB",
                    "codes",
                    "experts",
                )
            )
            shapes = ((), (0,), (1,), (2, 3), (2, 3, 4), (0, 4), (128, 1), (1, 2, 3, 4))
            found.append((f"{name.rpartition('.')[0]}.{suffix}", rng.choice(list(SIZES)), rng.choice(shapes)))
        else:
            keep = rng.choice(("mlp", "self_attn", "layers.0", "norm", "weight"))
            found = [tensor for tensor in found if keep not in tensor[0]] or found[:1]
    unique = {tensor[0]: tensor for tensor in found}
    return list(unique.values())


def _odd_name(rng: random.Random, name: str) -> str:
    parts = name.split(".")
    at = rng.randrange(len(parts))
    parts[at] = rng.choice(
        (
            "",
            "0",
            "1",
            "7",
            "99",
            "999999999",
            "9999999999",
            "10" * 20,
            "-1",
            "٣",
            "²",
            "layers",
            "experts",
            "experts.0",
            "experts.5",
            "mtp",
            "vision",
            "q_proj",
            "weight",
            "A" * 300,
            "[red]x[/]",
            "*",
            "re:x",
            "self_attn",
            "linear_attn",
            "..",
            "norm",
            "{0}",
            "%s",
        )
    )
    return ".".join(parts)


# --- indexes


def make_index(rng: random.Random, root: Path, _shared: Path) -> list[Command]:
    """An index that is damaged, or sends tensors elsewhere."""
    document: dict[str, dict[str, Any]] = {"metadata": {"total_size": 7}, "weight_map": {}}
    for number, shard in enumerate(SHARDED.shards, 1):
        document["weight_map"] |= dict.fromkeys(
            (tensor[0] for tensor in shard), f"model-{number:05d}-of-00003.safetensors"
        )
    raw = spoil_bytes(rng, json.dumps(document).encode()) if rng.random() < 0.25 else b""
    files = [f"model-{number:05d}-of-00003.safetensors" for number in range(5)]
    odd = (
        "../outside.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        ".",
        "..",
        "config.json",
        "x.bin",
        ".safetensors",
        "\x00.safetensors",
        "a" * 300 + ".safetensors",
        "C:\\x.safetensors",
        "link.safetensors",
        "fifo.safetensors",
    )
    names = list(document["weight_map"])
    if not raw and rng.random() < 0.6:
        for _ in range(rng.choice((1, 2, 5))):
            document["weight_map"][rng.choice((*names, *TEXTS))] = rng.choice((*files, *odd))
        raw = json.dumps(document).encode()
    model = SHARDED.write(root / "model", index=raw or spoil_json(rng, document, (*names, *files, *odd, "weight_map")))
    (root / "outside.safetensors").write_bytes(b"secret")
    if rng.random() < 0.3:
        (model / "link.safetensors").symlink_to(root / "outside.safetensors")
    if rng.random() < 0.3:
        os.mkfifo(model / "fifo.safetensors")
    return _verbs(rng, model)


# --- a file that no index names


def make_loose(rng: random.Random, root: Path, _shared: Path) -> list[Command]:
    """A file beside the weights that may hold prediction layers: sound, damaged, of odd tensors, or of the model's."""
    base = rng.choice((SHARDED, *BASES.values()))
    head = [
        ("mtp.fc.weight", "BF16", (64, 128)),
        ("mtp.norm.weight", "BF16", (64,)),
        ("mtp.fc.weight_scale", "F32", ()),
    ]
    tensors: list[Tensor] = [*head[: rng.randrange(1, 4)]]
    tensors += rng.sample(list(base.shards[0]), rng.choice((0, 0, 1, 3)))
    tensors += [
        (
            f"model.layers.{rng.choice((0, 2, 61, 10**8))}.mlp.experts.{rng.randrange(9)}.up_proj.weight",
            rng.choice(("BF16", "F8_E4M3")),
            (64, 64),
        )
        for _ in range(rng.choice((0, 0, 1, 3)))
    ]
    stated: object = rng.choice((1, 1, 1, 0, -1, None, "1", [], {"a": 1}, 10**9, True))
    config = json.dumps({**base.config, rng.choice(("num_nextn_predict_layers", "mtp_num_hidden_layers")): stated})
    model = base.write(root / "model", config=config.encode())
    front = dump_header(header_of(tensors))
    kind = rng.randrange(6)
    if kind == 0:
        front = spoil_bytes(rng, front)
    elif kind == 1:
        front = _lied(rng, front)
    elif kind == 2:
        front = framed(dump(_moved(rng, header_of(tensors))).encode("utf-8", "surrogatepass"))
    elif kind == 3:
        tensors = _odd_tensors(rng, tensors)
        front = dump_header(header_of(tensors))
    name = rng.choice(
        ("mtp.safetensors", "mtp.safetensors", "x.safetensors", "\u2028.safetensors", "adapter_x.safetensors")
    )
    if rng.random() < 0.05:
        os.mkfifo(model / name)
    else:
        write_shard(model / name, front, size_of(tensors))
    return _verbs(rng, model)


# --- configs


def make_config(rng: random.Random, root: Path, _shared: Path) -> list[Command]:
    """A config.json with values and keys that none has."""
    base = rng.choice(list(BASES.values()))
    model = base.write(root / "model", config=_config(rng, base))
    return _verbs(rng, model)


def _config(rng: random.Random, base: Base) -> bytes:
    kind = rng.randrange(10)
    if kind == 0:
        return spoil_bytes(rng, json.dumps(base.config).encode())
    config: dict[str, Any] = json.loads(json.dumps(base.config))
    if kind < 5:  # a key that some verb reads
        texts = [
            part for key in ("text_config", "llm_config", "thinker_config") if isinstance(part := config.get(key), dict)
        ]
        for _ in range(rng.choice((1, 1, 2, 3))):
            rng.choice([config, *texts])[rng.choice(WORDS)] = nasty(rng, WORDS)
        return dump(config).encode("utf-8", "surrogatepass")
    return spoil_json(rng, config, WORDS)


def make_quantization(rng: random.Random, root: Path, _shared: Path) -> list[Command]:
    """What a config says of quantization, in all dialects, damaged; also in ModelOpt's file of its own."""
    name = rng.choice([name for name in DIALECTS if name != "16-bit"])
    base = DIALECTS[name]
    if base.files:
        (file, content), *_ = base.files.items()
        model = base.write(root / "model")
        damaged = spoil_bytes(rng, content) if rng.random() < 0.2 else spoil_json(rng, json.loads(content), WORDS)
        (model / file).write_bytes(damaged)
        return _verbs(rng, model)
    config: dict[str, Any] = json.loads(json.dumps(base.config))
    place = config.get("text_config", config)
    key = next(key for key in ("quantization_config", "quantization") if key in place)
    given = place[key] | rng.choice(
        ({}, *(dict(STORED_CONFIG[other]) for other in ("nvfp4", "fp8", "modelopt", "int4")))
    )
    damaged = spoil_json(rng, given, WORDS)
    place[key] = "@@quantization@@"
    model = base.write(root / "model", config=json.dumps(config).encode().replace(b'"@@quantization@@"', damaged))
    return _verbs(rng, model)


STORED_CONFIG: Mapping[str, Mapping[str, Any]] = {
    name: base.config["quantization_config"] for name, base in DIALECTS.items() if "quantization_config" in base.config
}


# --- what doctor and repair read


def make_doctor(rng: random.Random, root: Path, shared: Path) -> list[Command]:
    """Any of the damages of headers, indexes, configs and quantizations, looked at by doctor and corrected."""
    make = rng.choice((make_header, make_index, make_loose, make_config, make_quantization, make_quantization))
    make(rng, root, shared)
    model = str(root / "model")
    doctor = ["doctor", model]
    doctor += rng.choice(([], ["--gpu", "H100"], ["--gpu", "RTX 5090", "--tp", "2"], ["--engine", "sglang"]))
    doctor += rng.choice((["--json"], ["--json"], ["--github"], []))
    dialect = rng.choice(([], [], ["--dialect", "modelopt"], ["--dialect", "compressed-tensors"]))
    repair = ["repair", model, *dialect, *rng.choice((["--json"], []))]
    # models of true size are holes, and would be written as zeros
    large = sum(file.stat().st_size for file in (root / "model").glob("*.safetensors") if file.is_file()) > 100_000_000
    return [doctor, [*repair, *(["--dry-run"] if large or rng.random() < 0.5 else ["-o", str(root / "out")])]]


def make_values(rng: random.Random, root: Path, shared: Path) -> list[Command]:
    """A quantized model whose bytes or small files are damaged: its values are read, and its base beside it."""
    model = root / "model"
    shutil.copytree(shared / "quantized", model)
    file = model / rng.choice((SINGLE, SINGLE, "tokenizer_config.json", "tokenizer.json", "generation_config.json"))
    content = file.read_bytes()
    if file.name == SINGLE and rng.random() < 0.8:  # behind the header: codes and scales
        changed, start = bytearray(content), 8 + struct.unpack("<Q", content[:8])[0]
        for _ in range(rng.choice((1, 10, 1000))):
            changed[rng.randrange(start, len(changed))] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        file.write_bytes(changed)
    elif file.name == SINGLE or rng.random() < 0.3:
        file.write_bytes(spoil_bytes(rng, content))
    else:
        words = ("added_tokens", "added_tokens_decoder", "eos_token", "eos_token_id", "chat_template", "content", "id")
        file.write_bytes(spoil_json(rng, json.loads(content), words))
    doctor = ["doctor", str(model), "--values", rng.choice(("sample", "all")), *rng.choice((["--json"], []))]
    doctor += rng.choice(([], ["--base", str(shared / "model")]))
    repair = ["repair", str(model), "-o", str(root / "out"), *rng.choice(([], ["--dialect", "modelopt"]))]
    return [doctor, repair]


# --- recipes


def make_recipe(rng: random.Random, root: Path, _shared: Path) -> list[Command]:
    """A recipe file that is damaged."""
    import yaml

    from snugfit.recipes.recipe import builtin_names, load_recipe

    mine = (
        "name: mine\ndescription: a mix\nkv_cache: fp8\nrules:\n"
        "  - {role: [gate, up], layers: '0..1, -1', format: fp8-dynamic}\n"
        "  - role: mlp\n    format: nvfp4\n    scale_rule: sweep\n    objective: mse\n"
        "  - name: '*.self_attn.o_proj'\n    format: keep\n  - name: re:.*v_proj\n    format: keep\n"
        "  - role: linear\n    format: int4\n    group_size: [128, 64, 32]\n    symmetric: false\n"
    )
    text = rng.choice((mine, mine, load_recipe(rng.choice(builtin_names())).text))
    file = root / "recipe.yaml"
    file.write_bytes(spoil_yaml(rng, text, lambda: yaml.safe_load(text)))
    base = rng.choice((BASES["16-bit"], BASES["16-bit"], BASES["fp8"], BASES["deepseek"], BASES["gemma3"], SHARDED))
    model = base.write(root / "model")
    samples = root / "samples.jsonl"  # token ids, since these models have no tokenizer
    samples.write_text('{"input_ids": [3, 4, 5, 6, 7, 8]}\n', encoding="utf-8")
    json_ = rng.choice(([], ["--json"]))
    return [
        ["quantize", str(model), "-r", str(file), "--dry-run", "--dataset", str(samples), *json_],
        ["fit", str(model), "--gpu", "16GiB", "-r", str(file), *json_],
        ["recipes", str(file), *json_],
    ]


# --- results


def make_result(rng: random.Random, root: Path, _shared: Path) -> list[Command]:
    """A result of `eval` that is damaged, compared with a sound one; and a damaged record beside a model."""
    import helpers.results as made

    scores = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    if rng.random() < 0.5:
        pair = made.evals(
            root, [made.model("x", made.shifted(0.1), kl=[0.1] * 6)], [made.model("y", made.shifted(0.3), kl=[0.2] * 6)]
        )
    else:
        tasks = made.task("t", scores), made.task("u", [0.5, 0.25, 0.1], metric="loss")
        pair = made.write_tasks(root / "a.json", *tasks), made.write_tasks(root / "b.json", *tasks)
    which = rng.choice(pair)
    content = which.read_bytes()
    words = (
        "schema",
        "models",
        "contexts",
        "tasks",
        "items",
        "kl",
        "by_chunk",
        "chunk_tokens",
        "nonfinite",
        "snugfit.eval/1",
        "snugfit.tasks/1",
    )
    spoiled = spoil_bytes(rng, content) if rng.random() < 0.3 else spoil_json(rng, json.loads(content), words)
    which.write_bytes(_with_digest(rng, spoiled))
    out = rng.choice(([], ["-o", str(root / "out")]))
    commands = [["compare", str(pair[0]), str(pair[1]), *rng.choice(([], ["--json"])), *out]]
    if rng.random() < 0.2:
        record = {"snugfit": "0.1", "recipe": "nvfp4-four-over-six", "tensors": [], "files": {}}
        model = BASES["16-bit"].write(root / "model")
        (model / "snugfit-record.json").write_bytes(spoil_json(rng, record, ("snugfit", "recipe")))
        commands.append(["inspect", str(model), *rng.choice(([], ["--json"]))])
    return commands


# --- plans


def make_plan(rng: random.Random, root: Path, _shared: Path) -> list[Command]:
    """Constraints or scores of a plan that are damaged."""
    import yaml

    from helpers.plan_scores import made_up_scores
    from snugfit.model.layout import read_layout

    text = (
        "max_formats: 2\nrun_length: 2\nkv_cache: keep\nrules:\n  - role: [q, k, v]\n    layers: '0..1, -1'\n"
        "    format: [fp8-dynamic, keep]\n  - {role: down, not: mxfp4}\n  - {name: re:.*o_proj, not: [int4, nvfp4]}\n"
        "  - {name: '*.mlp.*', format: [nvfp4, fp8-dynamic, keep, int4]}\n"
    )
    model = BASES["16-bit"].write(root / "model")
    constraints, scores = root / "constraints.yaml", root / "scores.json"
    content = made_up_scores(read_layout(model), cache_of_layers=(0.0005, 0.0005)).to_json()
    constraints.write_text(text, encoding="utf-8")
    scores.write_text(content, encoding="utf-8")
    kind = rng.random()
    if kind < 0.45:
        constraints.write_bytes(spoil_yaml(rng, text, lambda: yaml.safe_load(text)))
    elif kind < 0.9:
        words = ("kl", "error", "costs", "groups", "damage", "ceiling", "factors", "edges", "keep", "nvfp4", "kv_cache")
        broken = rng.random() < 0.3
        spoiled = spoil_bytes(rng, content.encode()) if broken else spoil_json(rng, json.loads(content), words)
        scores.write_bytes(_with_digest(rng, spoiled))
    budget = rng.choice(
        (["--bits-per-weight", "10"], ["--max-kl", "1"], ["--gpu", "16GiB", "--context", "64", "--bytes", "3MB"])
    )
    arguments = ["--scores", str(scores), "--constraints", str(constraints), "--no-prove"]
    json_ = rng.choice(([], ["--json"]))
    return [["plan", str(model), *budget, *arguments, "-o", str(root / "out"), *json_]]


def _change_leaves(rng: random.Random, document: dict[str, Any]) -> None:
    """Some texts and numbers become others of their type, which readers of types alone accept."""
    places: list[tuple[Any, Any]] = []
    stack: list[Any] = [document]
    while stack:
        node = stack.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, dict | list):
                stack.append(value)
            elif key != "schema":
                places.append((node, key))
    for node, key in rng.sample(places, min(len(places), rng.choice((1, 2, 5, 30)))):
        value = node[key]
        if isinstance(value, str):
            node[key] = rng.choice(
                ("", "a", "../..", "A" * 5000, "<script>", "|", "`", "\x00", "\ud800", "{{x}}", "٣", "-1")
            )
        elif isinstance(value, bool):
            node[key] = not value
        elif isinstance(value, int):
            node[key] = rng.choice((0, 1, -1, 7, 2**31, 2**63, 10**30, -(10**30)))
        elif isinstance(value, float):
            node[key] = rng.choice((0.0, -1.0, 1e-300, 1e308, -1e308, 0.5, None))


def make_record(rng: random.Random, root: Path, _shared: Path) -> list[Command]:
    """Records of every kind of which one is damaged, most of them with a digest that fits: a report, and its upload."""
    import helpers.report_runs as made
    import snugfit.publishing.report as publishing
    from snugfit.report.plots import draw

    # drawing takes most of the time, and is the same for most damages
    publishing.draw = draw if rng.random() < 0.04 else lambda _plot, _folder: []  # type: ignore[assignment, attr-defined]
    runs = made.write_runs(root / "runs")
    file = next(rng.choice(runs).glob("*.json"))
    content = file.read_bytes()
    document = json.loads(content)
    words = (
        "schema",
        "record_digest",
        "tensors",
        "shape",
        "bytes",
        "format",
        "contexts",
        "models",
        "kl",
        "cells",
        "runs",
    )
    more = (
        "groups",
        "points",
        "arguments",
        "dataset",
        "sources",
        "name",
        "target",
        "files",
        "snugfit.plan/1",
        document["schema"],
    )
    spoiled = spoil_bytes(rng, content) if rng.random() < 0.1 else spoil_json(rng, document, (*words, *more))
    if rng.random() < 0.5:
        _change_leaves(rng, document)
        spoiled = dump(document).encode("utf-8", "surrogatepass")
    file.write_bytes(_with_digest(rng, spoiled))
    given = list(map(str, runs if rng.random() < 0.5 else [file.parent, *rng.sample(runs, 2)]))
    options = rng.choice(([], ["--license", "mit", "--repo", "me/made-up"], ["--json"]))
    out = str(root / "report")
    push = [
        "push",
        rng.choice((str(file.parent), out)),
        "me/made-up",
        "--dry-run",
        *rng.choice(([], ["--report", out])),
    ]
    return [["report", *given, "-o", out, *options], push]


def make_bench(rng: random.Random, root: Path, _shared: Path) -> list[Command]:
    """A result of another tool, or a record of `bench`, that is damaged, read by `bench --import`."""
    from snugfit.benchmarking.bench import write_bench
    from snugfit.benchmarking.imported import import_bench

    files = sorted((Path(__file__).parents[1] / "fixtures" / "bench").glob("*.json"))
    source = rng.choice(files)
    if rng.random() < 0.3:
        write_bench(import_bench(source), root / "own")
        source = root / "own" / "bench.json"
    content = source.read_bytes()
    words = (
        "schema",
        "runs",
        "cells",
        "benchmarks",
        "metrics",
        "completed",
        "request_count",
        "values",
        "status",
        "avg",
    )
    file = root / "result.json"
    spoiled = spoil_bytes(rng, content) if rng.random() < 0.3 else spoil_json(rng, json.loads(content), words)
    file.write_bytes(_with_digest(rng, spoiled))
    out = rng.choice(([], ["-o", str(root / "out")]))
    return [["bench", "--import", str(file), *rng.choice(([], ["--json"])), *out]]


# --- runs


def make_rows(rng: random.Random, root: Path, shared: Path) -> list[Command]:
    """Samples in JSONL that are damaged, to calibrate and to evaluate on."""
    rows: list[Any] = [
        {"input_ids": [3, 4, 5, 6, 7, 8]},
        {"text": "the quick brown fox jumps over the lazy dog " * 3},
        {"messages": [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Loire."}]},
    ]
    words = ("input_ids", "text", "messages", "role", "content", "assistant", "user", "tool", "system", "tool_calls")
    lines = [json.dumps(row).encode() for row in rows]
    at = rng.randrange(len(rows))
    lines[at] = spoil_bytes(rng, lines[at]) if rng.random() < 0.3 else spoil_json(rng, rows[at], words)
    content = b"\n".join(lines) + b"\n"
    file = root / f"rows{rng.choice(('.jsonl', '.jsonl', '.jsonl', '.txt'))}"
    file.write_bytes(spoil_bytes(rng, content) if rng.random() < 0.2 else content)
    return [_quantize(root, shared / "model", "nvfp4-four-over-six", file), _eval(root, shared / "model", file)]


def make_set(rng: random.Random, root: Path, shared: Path) -> list[Command]:
    """A set that is damaged: its keys, a template in it, or the rows that it names."""
    import yaml

    rows: list[Any] = [
        {"q": "Name a river.", "a": "The Loire.", "m": [{"from": "human", "value": "a"}]} for _ in range(3)
    ]
    text = (
        "calibration_set:\n  _templates: {a: &a 'Use {{ [1, 2][hash(row|string) % 2] }}'}\n"
        "  max_seq_length: 24\n  shuffle: true\n  seed: 42\n  draw: random\n  max_tokens: 90\n  datasets:\n"
        "    - {dataset: rows.jsonl, columns: [q, a], formatter: prompt_answer, num_samples: 2, category: one}\n"
        "    - dataset: rows.jsonl\n      columns: [q]\n      formatter: raw_text\n      num_samples: all\n"
        "      formatter_params: {prefix: *a}\n"
        "    - {dataset: rows.jsonl, columns: [m], formatter: sharegpt, num_samples: 3, packing: true}\n"
        "    - {dataset: text.txt, num_samples: 1, draw: first}\n"
    )
    file = root / "set.yaml"
    kind = rng.randrange(4)
    if kind < 2:
        file.write_bytes(spoil_yaml(rng, text, lambda: yaml.safe_load(text)))
    elif kind == 2:
        parts = (
            "row",
            "q",
            "hash",
            "|string",
            "[0]",
            "__class__",
            "(",
            ")",
            " % ",
            " ** 99",
            "'a' * 9",
            "|join",
            "9" * 9,
        )
        template = "".join(rng.choice(parts) for _ in range(rng.randrange(1, 9))).replace("'", "''")
        file.write_text(text.replace("Use {{ [1, 2]", f"{{{{ {template} }}}} {{{{ [1, 2]"), encoding="utf-8")
    else:
        file.write_text(text, encoding="utf-8")
        at = rng.randrange(len(rows))
        rows[at] = spoil_json(rng, rows[at], ("q", "a", "m", "from", "value", "human", "gpt"))
    content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in map(_plain_row, rows))
    (root / "rows.jsonl").write_text(content, encoding="utf-8", errors="replace")
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 3, encoding="utf-8")
    json_ = rng.choice(([], ["--json"]))
    return [
        [
            "dataset",
            "show",
            str(file),
            "--model",
            str(shared / "model"),
            *rng.choice(([], ["--held-out", "20%"])),
            *json_,
        ],
        ["dataset", str(file), *json_],
        ["quantize", str(shared / "model"), "-r", "nvfp4-absmax", "--dry-run", "--dataset", str(file), *json_],
    ]


def _plain_row(row: Any) -> Any:
    return row.decode("utf-8", "replace") if isinstance(row, bytes) else row


def _quantize(root: Path, model: Path, recipe: str, rows: Path) -> Command:
    return [
        "quantize",
        str(model),
        "-r",
        recipe,
        "-o",
        str(root / "out"),
        "--dataset",
        str(rows),
        "--device",
        "cpu",
        "--json",
        "--num-samples",
        "3",
        "--max-seq-length",
        "32",
    ]


def _eval(root: Path, model: Path, text: Path) -> Command:
    return [
        "eval",
        str(model),
        "--dataset",
        str(text),
        "--context",
        "16",
        "--max-chunks",
        "2",
        "--device",
        "cpu",
        "--json",
        "-o",
        str(root / "result"),
    ]


def make_run(rng: random.Random, root: Path, shared: Path) -> list[Command]:
    """A model with weights, one file of it damaged, quantized and evaluated; or a stored reference that is damaged."""
    if rng.random() < 0.12:
        content = (shared / "reference.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        front = content[: 8 + length]
        changed = framed(spoil_json(rng, json.loads(front[8:]))) if rng.random() < 0.6 else spoil_bytes(rng, front)
        file = root / "reference.safetensors"
        file.write_bytes(changed + content[8 + length :])
        return [[*_eval(root, shared / "quantized", shared / "text.txt"), "--reference", str(file)]]
    written = rng.choice(("model", "model", "quantized"))
    model = root / "model"
    shutil.copytree(shared / written, model)
    files = [file for file in sorted(model.iterdir()) if file.suffix in (".json", ".jinja", ".yaml")]
    config = model / "config.json"
    file = rng.choice((*files, config, config, config, model / SINGLE))
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", content[:8])
        at = rng.randrange(8 + length, len(content))
        file.write_bytes(content[:at] + bytes(rng.choice((0, 0x7F, 0x80, 0xFF)) for _ in range(4)) + content[at + 4 :])
    elif file.suffix != ".json" or rng.random() < 0.1:
        file.write_bytes(spoil_bytes(rng, content))
    else:
        document = json.loads(content)
        words = (*WORDS, *(document if isinstance(document, dict) else ()))
        file.write_bytes(spoil_json(rng, document, words))
    if written == "quantized":
        return [["inspect", str(model)], _eval(root, model, shared / "text.txt")]
    rows = rng.choice((shared / "text.txt", shared / "rows.jsonl"))
    recipe = rng.choice(("nvfp4-four-over-six", "fp8-dynamic", "nvfp4-fp8-hybrid-fp8kv-four-over-six"))
    return [_quantize(root, model, recipe, rows), *([_eval(root, model, rows)] if rng.random() < 0.5 else [])]


def make_unfinished(rng: random.Random, root: Path, shared: Path) -> list[Command]:
    """What an unfinished run left, damaged; the same command resumes, starts again, or says why not."""
    partial = root / "out.partial"
    shutil.copytree(shared / "out.partial", partial)
    files = [file for file in sorted(partial.rglob("*")) if file.is_file()]
    spoilt: set[Path] = set()
    for _ in range(rng.choice((1, 1, 2))):
        file = rng.choice([file for file in files if file.suffix == ".json"] or files if rng.random() < 0.8 else files)
        if not file.is_file() or file in spoilt:  # a second time it might be no JSON
            continue
        spoilt.add(file)
        content = file.read_bytes()
        kind = rng.randrange(6)
        if kind == 0:
            file.unlink()
        elif kind == 1 and file.name != ".snugfit-lock":
            file.unlink()
            file.mkdir()
        elif file.suffix == ".json" and kind < 5:
            words = ("tensors", "written", "states", "name", "bytes", "shape", "source", "samples", "entry", "digest")
            file.write_bytes(spoil_json(rng, json.loads(content), words))
        else:
            file.write_bytes(spoil_bytes(rng, content))
    more = rng.choice(([], [], [], ["--force-resume"], ["--restart"]))
    return [[*_quantize(root, shared / "model", "nvfp4-fp8-hybrid-fp8kv-four-over-six", shared / "rows.jsonl"), *more]]


# --- statistics


def make_statistics(rng: random.Random, root: Path, shared: Path) -> list[Command]:
    """Statistics that are damaged, of a dense model or a mixture: shown, merged with sound ones, quantized with."""
    model, recipe = rng.choice(
        (("model", "nvfp4-fp8-hybrid-fp8kv-four-over-six"), ("mixture", "nvfp4-moe-four-over-six"))
    )
    content = (shared / f"{model}-0.json").read_bytes()
    file = root / rng.choice(("statistics.json", "statistics.json", "snugfit-statistics.json"))
    document = json.loads(content)
    kind = rng.randrange(10)
    if kind == 0:
        file.write_bytes(spoil_bytes(rng, content))
    elif kind < 8:
        _spoil_figures(rng, document["layers"])
        file.write_bytes(_with_digest(rng, dump(document).encode("utf-8", "surrogatepass")))
    else:
        words = ("schema", "datasets", "num_samples", "layers", "inputs", "experts", "cache", "histogram", "routed")
        more = ("amax", "tokens", "snugfit.statistics/1", "0", "1", "7", "-1")
        file.write_bytes(_with_digest(rng, spoil_json(rng, document, (*words, *more))))
    given = str(root if file.name.startswith("snugfit") else file)
    show = ["statistics", "show", given, *rng.choice(([], ["--json"]))]
    if rng.random() < 0.2:
        show += ["-o", str(root / "shown")]
    files = [given, str(shared / f"{model}-1.json")]
    rng.shuffle(files)
    merge = ["statistics", "merge", *files, "-o", str(root / "merged.json")]
    text = rng.choice(([], [], ["--dataset", str(shared / "rows.jsonl")]))
    options = rng.choice(
        (["--min-tokens-per-expert", "0"], ["--min-tokens-per-expert", "0"], [], ["--no-moe-calibrate-all-experts"])
    )
    quantize = ["quantize", str(shared / model), "-r", recipe, "-o", str(root / "out"), "--device", "cpu", "--json"]
    return [show, merge, [*quantize, "--statistics", given, *text, *options]]


def make_imatrix(rng: random.Random, root: Path, shared: Path) -> list[Command]:
    """An importance matrix of llama.cpp that is damaged, in either format: imported, then quantized with."""
    name = rng.choice(("model", "mixture"))
    content = (shared / f"{name}.{rng.choice(('gguf', 'dat'))}").read_bytes()
    kind, file = rng.randrange(6), root / "imatrix"
    if kind < 3:
        content = spoil_bytes(rng, content)
    else:  # lengths, counts and offsets of the front
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(min(len(content), 4096))
            number = rng.choice((0, 1, -1, 7, 1 << 30, (1 << 31) - 1, rng.getrandbits(31)))
            changed[at : at + 4] = struct.pack("<i", number)
        content = bytes(changed[: len(content)])
    file.write_bytes(content)
    model, given = str(shared / name), str(root / "statistics.json")
    quantize = ["quantize", model, "-r", "int4-w4a16", "-o", str(root / "out"), "--device", "cpu", "--json"]
    return [["statistics", "import", str(file), "--model", model, "-o", given], [*quantize, "--statistics", given]]


def _spoil_figures(rng: random.Random, layers: dict[str, Any]) -> None:
    """Values and names inside of layers, down to single counts, made into what no run measures."""
    odd: tuple[Any, ...] = (-1, 10**400, 10**400, -(10**400), 0, Raw("1e999"), Raw("NaN"), -3.5)
    names = "\ud800", "-1", "4079", "4080", "99999999999", "9" * 400, "x\x1b[2J"
    for _times in range(rng.choice((1, 1, 2, 3))):
        place: Any = layers
        for _ in range(rng.choice((0, 1, 2, 3, 4, 4, 5))):
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            inside = [key for key in keys if isinstance(place[key], dict | list) and len(place[key])]
            if not inside:
                break
            place = place[rng.choice(inside)]
        value = rng.choice(odd) if rng.random() < 0.7 else nasty(rng)
        if isinstance(place, list):
            place[rng.randrange(len(place))] = value
        elif rng.random() < 0.4:
            place[rng.choice(list(place))] = value
        else:
            old = rng.choice(list(place))
            place[rng.choice(names)] = place[old] if rng.random() < 0.8 else value


TARGETS: Mapping[str, Target] = {
    "header": Target(make_header, 3000),
    "index": Target(make_index, 900),
    "loose": Target(make_loose, 300),
    "config": Target(make_config, 2400),
    "quantization": Target(make_quantization, 1200),
    "doctor": Target(make_doctor, 1200),
    "recipe": Target(make_recipe, 1400),
    "plan": Target(make_plan, 150, heavy=True),
    "result": Target(make_result, 600),
    "record": Target(make_record, 400, heavy=True),
    "bench": Target(make_bench, 400),
    "rows": Target(make_rows, 150, heavy=True),
    "set": Target(make_set, 400, heavy=True),
    "values": Target(make_values, 150, heavy=True),
    "run": Target(make_run, 250, heavy=True),
    "unfinished": Target(make_unfinished, 100, heavy=True),
    "statistics": Target(make_statistics, 250, heavy=True),
    "imatrix": Target(make_imatrix, 250, heavy=True),
}
