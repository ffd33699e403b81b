"""Models, recipes and partial outputs of strangers: no code of theirs runs, no path leaves its place."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from helpers.errors import failed_with, raises
from helpers.hub_server import Hub, files_of, serve
from helpers.tiny_tokenizer import PROSE, add_tokenizer
from snugfit.cli.app import app
from snugfit.dialects.targets import Targets
from snugfit.errors import UserError, plain
from snugfit.patterns import Pattern
from snugfit.storage import http_ranges as ranges
from snugfit.storage.checkpoint import INDEX_NAME, SINGLE_NAME, read_header
from snugfit.storage.staging import LOCK_NAME, WORK_NAME

MakeTiny = Callable[..., Path]
Verb = Callable[["Place"], list[str]]
TALK = {"messages": [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Loire."}]}


HANG_SECONDS = 900


@dataclass
class Place:
    """A folder with a model, a text, rows of a chat, a recipe and results; nothing but `root` may change."""

    root: Path
    model: Path
    marker: Path
    recipe: str = "nvfp4-four-over-six"
    events: list[str] = field(default_factory=list)

    def run(self, verb: str, *options: object, rows: str = "text.txt") -> Any:
        """The result of a verb on the model; SIGALRM ends a hang, long after a busy machine would be done."""
        arguments = VERBS[verb](self, str(self.root / rows))
        signal.alarm(HANG_SECONDS)
        try:
            result = CliRunner().invoke(app, [*arguments, *map(str, options)])
        finally:
            signal.alarm(0)
        assert result.exit_code in (0, 2), (result.exit_code, result.stderr, repr(result.exception))
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert not self.marker.exists()
        return result


def quantize_arguments(place: Place, rows: str) -> list[str]:
    options = ("--num-samples", "2", "--max-seq-length", "32", "--device", "cpu")
    return ["quantize", str(place.model), "-r", place.recipe, "--dataset", rows, *options]


VERBS: dict[str, Callable[[Place, str], list[str]]] = {
    "inspect": lambda place, _: ["inspect", str(place.model)],
    "fit": lambda place, _: ["fit", str(place.model), "--gpu", "16GiB"],
    "dry run": lambda place, rows: [*quantize_arguments(place, rows), "--dry-run"],
    "quantize": lambda place, rows: [*quantize_arguments(place, rows), "-o", str(place.root / "out")],
    "eval": lambda place, rows: [
        *("eval", str(place.model), "--dataset", rows, "--context", "16", "--max-chunks", "2", "--device", "cpu"),
        *("-o", str(place.root / "result")),
    ],
}
READERS = [verb for verb in VERBS if verb != "eval"]


@pytest.fixture(scope="module")
def tiny(make_tiny: MakeTiny) -> Path:
    """A tiny llama with a tokenizer; tests copy it."""
    return add_tokenizer(make_tiny("llama", num_hidden_layers=1))


@pytest.fixture
def place(tiny: Path, tmp_path: Path) -> Place:
    """A copy of the model with what the verbs need."""
    root = tmp_path / "root"
    shutil.copytree(tiny, root / "model")
    (root / "text.txt").write_text(PROSE, encoding="utf-8")
    (root / "chat.jsonl").write_text(json.dumps(TALK) + "\n", encoding="utf-8")
    return Place(root, root / "model", tmp_path / "pwned")


def tree(folder: Path) -> dict[str, object]:
    """All below a folder: kinds, links, contents."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        plain_file = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = (
            path.read_bytes() if plain_file else str(path.readlink()) if path.is_symlink() else ""
        )
    return found


def message_of(result: Any) -> str:
    """The message of a verb that must refuse, in one printable line."""
    assert result.exit_code == 2, result.stdout
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("snugfit: ")
    assert line.isprintable()
    return str(line)


def edit(file: Path, **values: Any) -> None:
    document = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps(document), encoding="utf-8")


# --- pickles


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.close, (os.open, (str(self.marker), os.O_CREAT))


def write_bomb(file: Path, marker: Path) -> None:
    file.write_bytes(pickle.dumps(Bomb(marker)))


@pytest.fixture
def no_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever unpickles anything fails the test."""

    def explode(*_: Any, **__: Any) -> None:
        pytest.fail("unpickled")

    for owner, name in ((pickle, "Unpickler"), (pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(owner, name, explode)


PICKLES = ("pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt")


@pytest.mark.usefixtures("no_pickles")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_alone_are_refused(verb: str, name: str, place: Place) -> None:
    """A model whose weights are pickles is refused by every verb, unread, and the message says what they could do."""
    (place.model / SINGLE_NAME).unlink()
    write_bomb(place.model / name, place.marker)
    assert failed_with(place.run(verb), "weights-unsafe", place.model, name)
    assert not (place.root / "out").exists()


@pytest.mark.usefixtures("no_pickles")
@pytest.mark.parametrize("verb", VERBS)
def test_pickles_beside_safetensors_are_neither_read_nor_copied(verb: str, place: Place) -> None:
    """Pickles of any name beside the weights change nothing; those that engines would load are not in the result."""
    names = (
        *PICKLES,
        "training_args.bin",
        "optimizer.pt",
        "sub/pytorch_model.bin",
        "adapter_model.bin",
        "rng_state.pth",
    )
    (place.model / "sub").mkdir()
    for name in (*names, "data.pkl", "tokenizer.pkl"):
        write_bomb(place.model / name, place.marker)
    assert place.run(verb).exit_code == 0
    if verb == "quantize":
        assert not {path.name for path in (place.root / "out").rglob("*")} & {Path(name).name for name in names}


@pytest.mark.usefixtures("no_pickles")
@pytest.mark.parametrize("name", [SINGLE_NAME, "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_pickle_under_another_name(verb: str, name: str, place: Place) -> None:
    """A pickle in the place of another file is not taken for one."""
    write_bomb(place.model / name, place.marker)
    place.run(verb)


@pytest.mark.usefixtures("no_pickles")
def test_a_stored_reference_that_is_a_pickle(place: Place) -> None:
    """A stored reference that is a pickle is refused unread."""
    write_bomb(place.root / "reference.safetensors", place.marker)
    file = place.root / "reference.safetensors"
    assert failed_with(place.run("eval", "--reference", file), "reference-invalid", file)


# --- code that comes with a model

EVIL = "from pathlib import Path\nPath({marker!r}).touch()\nraise SystemExit(7)\n"


def add_code(place: Place, *names: str) -> None:
    for name in names:
        (place.model / f"{name}.py").write_text(EVIL.format(marker=str(place.marker)), encoding="utf-8")


AUTO_MAP = {
    "AutoConfig": "configuration_evil.EvilConfig",
    "AutoModel": "modeling_evil.EvilModel",
    "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM",
    "AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizerFast"],
    "AutoProcessor": "processing_evil.EvilProcessor",
}
CODE = (
    "configuration_evil",
    "modeling_evil",
    "tokenization_evil",
    "processing_evil",
    "__init__",
    "transformers",
    "torch",
)


@pytest.fixture(autouse=True)
def no_evil_modules() -> Iterator[None]:
    """No module of a model is ever imported."""
    yield
    assert not [name for name in sys.modules if "_evil" in name]


@pytest.mark.parametrize("verb", VERBS)
def test_code_of_a_known_architecture_is_not_run(verb: str, place: Place) -> None:
    """A llama whose config and tokenizer name classes of their own is read by transformers' own classes."""
    add_code(place, *CODE)
    edit(place.model / "config.json", auto_map=AUTO_MAP)
    edit(place.model / "tokenizer_config.json", auto_map=AUTO_MAP)
    assert place.run(verb).exit_code == 0


@pytest.mark.parametrize("verb", VERBS)
def test_code_of_an_unknown_architecture_is_not_run(verb: str, place: Place) -> None:
    """A model that only its own code could run is described from its headers, and refused where it would be run."""
    add_code(place, *CODE)
    edit(place.model / "config.json", auto_map=AUTO_MAP, model_type="evil", architectures=["EvilForCausalLM"])
    edit(place.model / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="EvilTokenizer")
    result = place.run(verb)
    if verb in ("quantize", "eval"):
        message = message_of(result)
        assert "[architecture-unknown]" in message or "[tokenizer-unusable]" in message
        assert "trust_remote_code" not in message
    assert not (place.root / "out").exists()


@pytest.mark.parametrize("verb", ["quantize", "eval"])
@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "evil/kernels"},
        {"_attn_implementation": "evil/kernels"},
        {"_attn_implementation_internal": "evil/kernels"},
        {"experts_implementation": "evil/kernels"},
        {"auto_map": {"AutoConfig": "evil/repo--configuration_evil.EvilConfig"}},
        {"hidden_act": "__import__('os').system('id')"},
        {"torch_dtype": "os.system"},
        {"dtype": "load"},
        {"_commit_hash": "../../../evil"},
        {"_name_or_path": "../../evil"},
    ],
    ids=str,
)
def test_config_values_that_name_code(verb: str, values: dict[str, Any], place: Place) -> None:
    """Values that name kernels, functions or places to load from are refused or unheard; nothing is fetched."""
    edit(place.model / "config.json", **values)
    place.run(verb)


# --- chat templates

ESCAPES = {
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "joiner": "{{ joiner.__init__.__globals__['os'].popen('touch MARKER').read() }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format map": "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "raise": "{{ raise_exception.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "strftime": "{{ strftime_now.__globals__ }}",
    "namespace": "{% set n = namespace() %}{{ n.__init__.__globals__ }}",
    "mutate": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "extends": "{% extends '../../secret' %}",
    "map": "{{ ['id']|map('__import__')|list }}",
    "tojson": "{{ cycler|tojson }}",
}
# errors inside the sandbox
FAILURES = {
    "zero": "{{ 1 // 0 }}",
    "overflow": "{{ 'x' * 10**30 }}",
    "memory": "{{ 'x' * 10**14 }}",
    "range": "{% for i in range(10**12) %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "undefined": "{{ nothing.at.all }}",
    "index": "{{ messages[99].content.x }}",
    "syntax": "{% if %}",
    "raises": "{{ raise_exception('no\x1b[2J') }}",
}


def set_template(place: Place, text: str) -> None:
    (place.model / "chat_template.jinja").write_text(text.replace("MARKER", str(place.marker)), encoding="utf-8")


@pytest.mark.parametrize("verb", ["quantize", "eval"])
@pytest.mark.parametrize("name", ESCAPES)
def test_templates_stay_in_their_sandbox(name: str, verb: str, place: Place) -> None:
    """A chat template that reaches for Python, files or modules is refused, or gets nothing."""
    set_template(place, "{% for m in messages %}{{ m['content'] }}{% endfor %}" + ESCAPES[name])
    result = place.run(verb, rows="chat.jsonl")
    if result.exit_code == 0:
        written = (place.root / ("out" if verb == "quantize" else "result")).rglob("*.json")
        assert not any("root:" in file.read_text(encoding="utf-8") for file in written)
    else:
        assert failed_with(result, "chat-template-failed", f"{place.root / 'chat.jsonl'}:1")


@pytest.mark.parametrize("verb", ["quantize", "eval"])
@pytest.mark.parametrize("name", FAILURES)
def test_templates_that_fail(name: str, verb: str, place: Place) -> None:
    """Whatever a chat template raises is one message with the row that was put into it."""
    set_template(place, FAILURES[name])
    result = place.run(verb, rows="chat.jsonl")
    assert failed_with(result, "chat-template-failed", f"{place.root / 'chat.jsonl'}:1")
    assert message_of(result)


# --- paths


def outside(place: Place) -> Path:
    """A file beside the model that no verb may show."""
    secret = place.root.parent / "secret.safetensors"
    if not secret.exists():
        shutil.copyfile(place.model / SINGLE_NAME, secret)
    return secret


def link(name: str) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        target = outside(place)
        (place.model / name).unlink(missing_ok=True)
        (place.model / name).parent.mkdir(exist_ok=True)
        (place.model / name).symlink_to(target)

    return change


def chained(place: Place) -> None:
    """A link to a link within, which leads out."""
    (place.model / "a").symlink_to(outside(place))
    (place.model / "b").symlink_to("a")


def folder(place: Place) -> None:
    """A folder that is a link."""
    (place.root.parent / "elsewhere").mkdir()
    (place.root.parent / "elsewhere" / "secret.txt").write_text("secret", encoding="utf-8")
    (place.model / "sub").symlink_to(place.root.parent / "elsewhere")


def parent_link(place: Place) -> None:
    """A link to what is above."""
    (place.model / "up").symlink_to("..")


def indexed(target: str) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        outside(place)
        (place.model / INDEX_NAME).write_text(json.dumps({"weight_map": {"lm_head.weight": target}}), encoding="utf-8")

    return change


LEAVING: dict[str, Callable[[Place], None]] = {
    "weights": link(SINGLE_NAME),
    "config": link("config.json"),
    "tokenizer": link("tokenizer.json"),
    "template": link("chat_template.jinja"),
    "other file": link("notes.txt"),
    "hidden file": link(".env"),
    "deep file": link("sub/notes.txt"),
    "quantization": link("hf_quant_config.json"),
    "record": link("snugfit-record.json"),
    "chain": chained,
    "folder": folder,
    "parent": parent_link,
    "index up": indexed("../secret.safetensors"),
    "index up twice": indexed("sub/../../../secret.safetensors"),
    "index absolute": indexed("/secret.safetensors"),
    "index backslash": indexed("..\\secret.safetensors"),
    "index NUL": indexed("x\0.safetensors"),
    "index dots": indexed(".."),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("way", LEAVING)
def test_nothing_outside_the_model_is_read(way: str, verb: str, place: Place) -> None:
    """Links and names in an index that lead out of the model's directory are refused; nothing is made."""
    LEAVING[way](place)
    before = tree(place.root.parent)
    message = message_of(place.run(verb))
    assert ("[index-invalid]" if way.startswith("index ") else "[file-outside-model]") in message
    assert tree(place.root.parent) == before


@pytest.mark.parametrize("verb", VERBS)
def test_a_snapshot_of_the_cache_is_read_through_its_links(verb: str, place: Place) -> None:
    """A model in the layout of Hugging Face's cache, links to its blobs, works, and is copied as files."""
    repo = place.root / "hub" / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / "0123").mkdir(parents=True)
    for number, file in enumerate(sorted(place.model.iterdir())):
        file.rename(repo / "blobs" / str(number))
        (repo / "snapshots" / "0123" / file.name).symlink_to(f"../../blobs/{number}")
    place.model = repo / "snapshots" / "0123"
    assert place.run(verb).exit_code == 0
    if verb == "quantize":
        assert not [path for path in (place.root / "out").rglob("*") if path.is_symlink()]


NEEDED = ("config.json", SINGLE_NAME, INDEX_NAME)
OPTIONAL = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt"),
    *("special_tokens_map.json", "hf_quant_config.json", "snugfit-record.json", "added_tokens.json", "vocab.json"),
    *("tokenizer.model", "chat_templates", "additional_chat_templates"),
)


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # such a path may have 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("make", [os.mkfifo, make_socket, Path.mkdir], ids=["pipe", "socket", "folder"])
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_no_file(verb: str, make: Callable[[Path], None], place: Place) -> None:
    """A pipe, a socket or a folder under any name that a verb reads is refused or passed over; nobody waits."""
    shutil.copytree(place.model, place.root.parent / "kept")
    # a pipe can keep somebody waiting: each has its turn
    for names in [*zip(NEEDED), *(zip(OPTIONAL) if make is os.mkfifo else [OPTIONAL])]:
        for name in names:
            (place.model / name).unlink(missing_ok=True)
            make(place.model / name)
        result = place.run(verb)
        if names[0] in NEEDED:
            assert failed_with(result, "file-unreadable", place.model / names[0])
        for made in (place.model, place.root / "out", place.root / "result"):
            shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(place.root.parent / "kept", place.model)


@pytest.mark.parametrize("verb", VERBS)
def test_a_link_to_itself(verb: str, place: Place) -> None:
    """A link that leads to itself is ignored."""
    (place.model / "loop").symlink_to("loop")
    assert place.run(verb).exit_code == 0
    assert not os.path.lexists(place.root / "out" / "loop")


@pytest.mark.parametrize("name", [SINGLE_NAME, "snugfit-recipe.yaml", "snugfit-record.json", WORK_NAME])
def test_folders_in_the_place_of_what_is_written(name: str, place: Place) -> None:
    """A source with a folder where a file is to be written is refused at once, not when all is done."""
    (place.model / SINGLE_NAME).rename(place.model / "a.safetensors")
    header = dict.fromkeys(open_names(place.model / "a.safetensors"), "a.safetensors")
    (place.model / INDEX_NAME).write_text(json.dumps({"weight_map": header}), encoding="utf-8")
    if name == WORK_NAME:
        (place.model / name).write_text("x", encoding="utf-8")
    else:
        (place.model / name).mkdir()
        (place.model / name / "x.txt").write_text("x", encoding="utf-8")
    assert message_of(place.run("quantize")).startswith(f"snugfit: {place.model / name}: ")
    assert not (place.root / "out.partial").exists()


def open_names(file: Path) -> list[str]:
    return [tensor.name for tensor in read_header(file)]


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "JSON"])
def test_names_that_are_no_text(options: tuple[str, ...], place: Place) -> None:
    """Files whose names are not UTF-8 are copied and shown, and so is a model of such a name."""
    for name in ("a\udcff.txt", "b\udcff.bin"):
        (place.model / name).write_text("x", encoding="utf-8")
    results = [place.run(verb, *options) for verb in VERBS]
    assert (place.root / "out" / "a\udcff.txt").is_file()
    place.model.rename(place.root / "m\udcfe\n")
    place.model = place.root / "m\udcfe\n"
    # no tokenizer can be loaded from there: token ids need none
    (place.root / "ids.jsonl").write_text(json.dumps({"input_ids": list(range(32))}) + "\n", encoding="utf-8")
    results += [place.run(verb, *options, rows="ids.jsonl") for verb in ("inspect", "fit", "dry run")]
    assert [result.exit_code for result in results] == [0] * len(results), [
        ascii(r.stderr) for r in results if r.exit_code
    ]
    assert not options or all(json.loads(result.stdout) for result in results)


def test_a_link_to_a_device(place: Place) -> None:
    """A weight file that is a link to a device without an end is refused as a link out of the directory."""
    (place.model / SINGLE_NAME).unlink()
    (place.model / SINGLE_NAME).symlink_to("/dev/zero")
    for verb in VERBS:
        assert failed_with(place.run(verb), "file-outside-model", place.model / SINGLE_NAME, "/dev/zero")


def test_hidden_folders_stay_where_they_are(place: Place) -> None:
    """What lies in hidden folders of a model, such as .git with its remotes, is not copied."""
    (place.model / ".git").mkdir()
    (place.model / ".git" / "config").write_text("url = https://user:password@host", encoding="utf-8")
    assert place.run("quantize").exit_code == 0
    assert not [path for path in (place.root / "out").rglob("*") if "password" in path.read_text("utf-8", "replace")]


# --- recipes

YAML_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES = {
    "object": "name: !!python/object/apply:os.system ['touch MARKER']\nrules: []\n",
    "new object": "!!python/object/new:os.system ['touch MARKER']\n",
    "name": "name: !!python/name:os.system\nrules: []\n",
    "module": "name: !!python/module:os\nrules: []\n",
    "tuple": "name: !!python/tuple [a]\nrules: []\n",
    "laughs": f"{YAML_BOMB}name: x\nrules: *i\n",
    "laughs in a key": f"{YAML_BOMB}name: x\nkv_cache: *i\nrules:\n  - {{role: linear, format: nvfp4}}\n",
    "laughs in layers": f"{YAML_BOMB}name: x\nrules:\n  - {{role: linear, format: nvfp4, layers: *i}}\n",
    "merged": "a: &a {k: v}\n"
    + "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "itself": "name: x\nrules: &r [*r]\n",
    "deep": "name: x\nrules: " + "[" * 50_000,
    "large": "name: x\n" + "# nothing\n" * 100_000,
    "slow pattern": "name: x\nrules:\n  - {name: 're:"
    + "(.*)" * 25
    + "[!?]', format: keep}\n  - {role: linear, format: nvfp4}\n",
    "large pattern": "name: x\nrules:\n  - {name: 're:((x{999}){999}){999}', format: keep}\n",
    "huge number": f"name: x\nkv_cache: 0x{'f' * 9000}\nrules:\n  - {{role: linear, format: nvfp4}}\n",
    "huge layers": f"name: x\nrules:\n  - {{role: linear, format: nvfp4, layers: '{'9' * 5000}'}}\n",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_strangers(name: str, place: Place) -> None:
    """A recipe that names Python objects, writes out to billions of words, or backtracks for years is refused."""
    file = place.root / "recipe.yaml"
    file.write_text(RECIPES[name].replace("MARKER", str(place.marker)), encoding="utf-8")
    place.recipe = str(file)
    message = message_of(place.run("dry run"))
    assert str(file) in message
    assert len(message) < 3000


def test_recipes_that_are_links_or_pipes(place: Place, tmp_path: Path) -> None:
    """A recipe may be a link, as the user named it; a pipe is no file, and nobody waits for it."""
    (tmp_path / "real.yaml").write_text("name: x\nrules:\n  - {role: linear, format: nvfp4}\n", encoding="utf-8")
    (place.root / "link.yaml").symlink_to(tmp_path / "real.yaml")
    place.recipe = str(place.root / "link.yaml")
    assert place.run("dry run").exit_code == 0
    os.mkfifo(place.root / "pipe.yaml")
    place.recipe = str(place.root / "pipe.yaml")
    assert failed_with(place.run("dry run"), "recipe-not-found", place.recipe)


SLOW = r"(?:(\w)|(\w\w)|(\w\w\w)|\.)*[!?]"  # backtracks without end on a long name
LONG_NAME = "model.layers.12.mlp.experts.100.gate_proj"


def test_patterns_of_configs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target of a quantization config that backtracks without end is given up with a message that shows it."""
    monkeypatch.setattr("snugfit.patterns.BUDGET_SECONDS", 0.2)
    targets = Targets([{"targets": [f"re:{SLOW}"]}], [], where="config.json")
    with raises("pattern-invalid", SLOW):
        targets.group_of(LONG_NAME)


def test_a_pattern_s_time_belongs_to_one_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern that has used up its time is refused from then on; another use of the same text has its own time."""
    monkeypatch.setattr("snugfit.patterns.BUDGET_SECONDS", 0.2)
    pattern = Pattern(SLOW)
    assert not pattern.begins("a")
    for name in (LONG_NAME, "a"):
        with raises("pattern-invalid", SLOW):
            pattern.begins(name)
    assert not Pattern(SLOW).begins("a")


@pytest.mark.parametrize(
    "text", ["a{1000}{1000}", "(a{1000}){1000}", "((a{99}){99}){99}", "x" * 30_000, "(", "(?P<a>x)(?P<a>y)"]
)
def test_invalid_and_too_large_patterns(text: str) -> None:
    """An invalid regular expression, and one that would fill the memory once compiled, is not a pattern."""
    with pytest.raises(ValueError, match=r".+"):
        Pattern(text)


# --- where results are written


def test_results_stay_in_their_place(place: Place) -> None:
    """A run and an evaluation make their own directories and change nothing else, the model least of all."""
    before = tree(place.root.parent)
    assert place.run("quantize").exit_code == 0
    assert place.run("eval").exit_code == 0
    after = tree(place.root.parent)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[1] for name in after.keys() - before.keys()} == {"out", "result"}


def test_output_through_a_link(place: Place, tmp_path: Path) -> None:
    """An output below a folder that is a link is written where the link leads, whole, and leaves nothing beside it."""
    (tmp_path / "disk").mkdir()
    (place.root / "results").symlink_to(tmp_path / "disk")
    out = place.root / "results" / "out"
    arguments = ["quantize", place.model, "-r", "fp8-dynamic", "-o", out, "--device", "cpu"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


def plant(partial: Path, victim: Path, name: str) -> None:
    """OUT.partial as a stranger might leave it: an unfinished run, one of its files a link to another's."""
    (partial / WORK_NAME).mkdir(parents=True)
    (partial / LOCK_NAME).touch()
    (partial / WORK_NAME / "unit-00000.json").write_text("{}", encoding="utf-8")
    (partial / name).unlink(missing_ok=True)
    (partial / name).symlink_to(victim)


@pytest.mark.parametrize(
    "name",
    [
        *(SINGLE_NAME, "config.json", "snugfit-record.json", "snugfit-recipe.yaml", "tokenizer.json", LOCK_NAME),
        *(f"{WORK_NAME}/{file}" for file in ("run.json", "run.new", "states-0", "unit-00000.new", "unit-00001.json")),
    ],
)
@pytest.mark.parametrize("there", [True, False], ids=["file", "nothing"])
def test_links_in_a_partial_output_are_not_followed(name: str, there: bool, place: Place, tmp_path: Path) -> None:
    """A link that someone put into OUT.partial is refused; `--restart` removes it, and never the file behind it."""
    victim = tmp_path / "victim"
    if there:
        victim.write_text("mine", encoding="utf-8")
    plant(place.root / "out.partial", victim, name)
    message = message_of(place.run("quantize"))
    assert name == LOCK_NAME or f"{place.root / 'out.partial' / name}: " in message
    assert name == LOCK_NAME or "[run-damaged]" in message
    assert (place.root / "out.partial" / name).is_symlink()
    if name != LOCK_NAME:
        assert place.run("quantize", "--restart").exit_code == 0
    assert victim.exists() is there
    assert not there or victim.read_text(encoding="utf-8") == "mine"


def test_a_partial_output_that_is_a_link(place: Place, tmp_path: Path) -> None:
    """OUT.partial that is a link to an unfinished run elsewhere is refused, and that is left alone."""
    plant(tmp_path / "theirs", tmp_path / "victim", SINGLE_NAME)
    (place.root / "out.partial").symlink_to(tmp_path / "theirs")
    before = tree(tmp_path / "theirs")
    assert failed_with(place.run("quantize"), "output-exists", place.root / "out.partial")
    assert tree(tmp_path / "theirs") == before


# --- the Hub


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that has the tiny model as org/name, and a token for it."""
    with serve(files_of(tiny)) as running:
        point_at(running.url, tmp_path / "cache", monkeypatch)
        yield running
        huggingface_hub.close_session()


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(ranges, "WAIT_SECONDS", (0.0,) * len(ranges.WAIT_SECONDS))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


HUB_NAMES = (
    "../../x",
    "../x.py",
    "/etc/x",
    "a/../../x",
    "a//b",
    "a\\..\\..\\x",
    "./x",
    "x\n",
    "",
    "sub/..",
    "C:\\x",
    "a/\x1b[2J",
)


@pytest.mark.parametrize("name", HUB_NAMES, ids=ascii)
@pytest.mark.parametrize("verb", READERS)
def test_a_hub_that_names_places_elsewhere(name: str, verb: str, hub: Hub, place: Place, tmp_path: Path) -> None:
    """A list of files on the Hub with a name that is no place in a directory is refused before anything is fetched."""
    hub.files = {**hub.files, name: b"evil"}
    place.model = Path("org/name")
    before = tree(tmp_path)
    assert failed_with(place.run(verb), "file-outside-model", "org/name")
    assert tree(tmp_path) == before


def test_a_token_is_shown_to_nobody(hub: Hub, place: Place) -> None:
    """The Hub's token is in no answer, no message and no file of a result."""
    place.model = Path("org/name")
    for verb in READERS:
        result = place.run(verb, "--json")
        assert result.exit_code == 0, result.stderr
        assert "hf_secret" not in result.stdout + result.stderr
    files = [path for path in place.root.rglob("*") if path.is_file()]
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]
    for denied in ((401, ""), (403, ""), (403, "GatedRepo"), (404, "RepoNotFound"), (500, "")):
        hub.denied = denied
        assert "hf_secret" not in message_of(place.run("inspect"))


def test_an_endpoint_s_password_is_not_shown(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password in HF_ENDPOINT stays out of the message that it cannot be reached."""
    point_at("http://user:hunter2@127.0.0.1:9", tmp_path / "cache", monkeypatch)
    place.model = Path("org/name")
    message = message_of(place.run("inspect"))
    assert "hunter2" not in message
    assert "127.0.0.1:9" in message
    assert "[hub-unreachable]" in message


# --- what is shown


@pytest.mark.parametrize(
    "text",
    ["\x1b[2J\x1b[31m", "a\rb", "\u202egnp.exe", "\x9b2J", "\ud800", "a\nsnugfit: all is well", "\x07"],
    ids=ascii,  # a lone surrogate in a test's name cannot be sent to another process
)
def test_what_a_model_says_cannot_move_the_cursor(text: str, place: Place) -> None:
    """Control characters, line ends and reversed text out of a model's files are escaped on the screen."""
    config = {"model_type": text, "architectures": [text], "dtype": text, "quantization_config": {"quant_method": text}}
    edit(place.model / "config.json", **config)
    for verb in VERBS:
        result = place.run(verb)
        shown = result.stdout.replace("\n", "") + result.stderr.replace("\n", "")
        assert shown.isprintable(), ascii(shown)
        assert "\nsnugfit: all is well" not in result.stdout + result.stderr


def test_messages_are_printable_and_no_book() -> None:
    """Parts of a message are escaped where they cannot be printed, and lose their middle where they are endless."""
    error = UserError("a\x1b" + "b" * 10**6, code="option-invalid", where="c\n", remedy="d\u202e")
    assert str(error).isprintable()
    assert len(str(error)) < 3000
    assert str(error).startswith("c\\n: a\\x1bbb")
    assert str(error).endswith("d\\u202e")
    assert plain("plain é 漢字") == "plain é 漢字"
