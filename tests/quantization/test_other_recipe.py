"""A layer for which no scale can be made stops a run; a recipe that keeps its tensors resumes there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import MakeTiny
from helpers.errors import failed_with, raises
from helpers.tiny_families import all_tensors, random_rows, write_rows
from helpers.tiny_mixtures import rewrite
from snugfit.cli.app import app
from snugfit.errors import Unfinished
from snugfit.quantization.quantize import quantize
from snugfit.storage.staging import WORK_NAME, units_done

DEAD = "model.layers.2.mlp.down_proj"
KEEP_DEAD = f"  - {{role: linear, name: {DEAD}, format: keep}}\n"
ALL_NVFP4 = "  - {role: linear, format: nvfp4, scale_rule: four-over-six}\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two samples of 32 token ids."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", random_rows([32, 32], stop=64))


@pytest.fixture(scope="module")
def dead(make_tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers whose third has an MLP that is always zero."""
    path = tmp_path_factory.mktemp("dead") / "model"
    shutil.copytree(make_tiny("llama", num_hidden_layers=4), path)
    tensors = all_tensors(path)
    tensors["model.layers.2.mlp.up_proj.weight"].zero_()
    rewrite(path, tensors)
    return path


def recipe(folder: Path, rules: str, name: str = "mine") -> str:
    """A recipe file with these rules."""
    file = folder / "recipe.yaml"
    file.write_text(f"name: {name}\nrules:\n{rules}", encoding="utf-8")
    return str(file)


def stopped(model: Path, folder: Path, text: Path, **options: Any) -> Path:
    """A run that stopped at the dead layer, behind two finished ones."""
    with raises("amax-invalid", where=DEAD) as caught:
        quantize(model, recipe(folder, ALL_NVFP4), output_dir=folder / "out", dataset=[text], **options)
    assert isinstance(caught.value, Unfinished)
    assert "2 finished layers" in caught.value.remedy
    partial = folder / "out.partial"
    assert units_done(partial) == 3
    return partial


def files(folder: Path) -> dict[str, bytes]:
    """The weight files of a model, and what describes them."""
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.suffix == ".safetensors" or file.name in ("config.json", "model.safetensors.index.json")
    }


@pytest.mark.parametrize("options", [{}, {"max_shard_size": 20_000}], ids=["one shard", "shards"])
def test_a_recipe_that_keeps_the_tensor_resumes(
    options: dict[str, Any], dead: Path, text: Path, tmp_path: Path
) -> None:
    """The result has the bytes of a run that had this recipe from the beginning, and two layers were not run again."""
    stopped(dead, tmp_path, text, **options)
    other = recipe(tmp_path, KEEP_DEAD + ALL_NVFP4)
    record = quantize(dead, other, output_dir=tmp_path / "out", dataset=[text], **options)
    assert record.resumed is not None
    assert record.resumed["units"] == 3
    quantize(dead, other, output_dir=tmp_path / "fresh", dataset=[text], **options)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".snugfit")]


def test_a_recipe_that_changes_finished_layers_is_refused(dead: Path, text: Path, tmp_path: Path) -> None:
    """Another format of a finished layer, or other samples as well, leave the run as it was."""
    partial = stopped(dead, tmp_path, text)
    before = {path: path.read_bytes() for path in partial.rglob("*") if path.is_file()}
    early = "  - {role: mlp, layers: '0', format: fp8-dynamic}\n"
    other = recipe(tmp_path, early + KEEP_DEAD + ALL_NVFP4)
    with raises("run-differs", where=partial):
        quantize(dead, other, output_dir=tmp_path / "out", dataset=[text])
    late = recipe(tmp_path, KEEP_DEAD + ALL_NVFP4)
    with raises("run-differs", where=partial):
        quantize(dead, late, output_dir=tmp_path / "out", dataset=[text], num_samples=1)
    assert {path: path.read_bytes() for path in partial.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_kill_while_tensors_move(
    moment: str, dead: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the moved files count, while they are put in place, or behind: the next start ends in the bytes."""
    options: dict[str, Any] = {"max_shard_size": 20_000}
    partial = stopped(dead, tmp_path, text, **options)
    other = recipe(tmp_path, KEEP_DEAD + ALL_NVFP4)
    with monkeypatch.context() as patch:
        if moment == "before":

            def stop(_file: Path, _content: dict[str, object]) -> None:
                raise KeyboardInterrupt

            patch.setattr("snugfit.quantization.other_recipe.replace_json", stop)
        elif moment == "between":
            rename, count = Path.replace, [0]

            def few(self: Path, target: Path) -> Path:
                count[0] += self.suffix == ".safetensors"
                if count[0] > 2:
                    raise KeyboardInterrupt
                return rename(self, target)

            patch.setattr(Path, "replace", few)
        else:
            patch.setattr("snugfit.quantization.other_recipe.shutil.rmtree", stop_at_moved)
        with pytest.raises(KeyboardInterrupt):
            quantize(dead, other, output_dir=tmp_path / "out", dataset=[text], **options)
    assert units_done(partial) == 3
    record = quantize(dead, other, output_dir=tmp_path / "out", dataset=[text], **options)
    assert record.resumed is not None
    assert record.resumed["units"] == 3
    quantize(dead, other, output_dir=tmp_path / "fresh", dataset=[text], **options)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def stop_at_moved(folder: Path, **given: bool) -> None:
    """A removal that is killed, once there is something to remove."""
    if folder.exists():
        raise KeyboardInterrupt


def test_the_first_layer_leaves_nothing(dead: Path, text: Path, tmp_path: Path) -> None:
    """If no layer is finished, nothing stays."""
    path = tmp_path / "model"
    shutil.copytree(dead, path)
    tensors = all_tensors(path)
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    rewrite(path, tensors)
    with raises("amax-invalid", where="model.layers.0.mlp.down_proj"):
        quantize(path, "nvfp4-four-over-six", output_dir=tmp_path / "out", dataset=[text])
    assert not (tmp_path / "out.partial").exists()


def test_damaged_files_of_a_move(dead: Path, text: Path, tmp_path: Path) -> None:
    """Damaged shards or a damaged identity of moved files are not trusted: what they hold is done again."""
    partial = stopped(dead, tmp_path, text)
    moved = partial / WORK_NAME / "moved"
    moved.mkdir()
    (moved / "run.json").write_text("[", encoding="utf-8")
    (moved / "model.safetensors").write_bytes(b"none")
    other = recipe(tmp_path, KEEP_DEAD + ALL_NVFP4)
    (partial / "model.safetensors").write_bytes(b"none")
    with raises("run-differs", where=partial):
        quantize(dead, other, output_dir=tmp_path / "out", dataset=[text])
    assert json.loads((partial / WORK_NAME / "run.json").read_text(encoding="utf-8"))["units"]


def test_the_command_line_says_how_to_resume(dead: Path, text: Path, tmp_path: Path) -> None:
    """The message names the tensor, the directory with the finished layers, and that a recipe may differ later on."""
    given = [dead, "-r", recipe(tmp_path, ALL_NVFP4), "-o", tmp_path / "out", "--dataset", text]
    result = CliRunner().invoke(app, ["quantize", *map(str, given)])
    assert failed_with(result, "amax-invalid", f"{DEAD}: ", tmp_path / "out.partial", "recipe")
    recipe(tmp_path, KEEP_DEAD + ALL_NVFP4)
    result = CliRunner().invoke(app, ["quantize", *map(str, given)])
    assert result.exit_code == 0, result.stderr
