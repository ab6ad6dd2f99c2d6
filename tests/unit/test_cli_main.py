from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from manyeyes.recipe import list_recipes
from tests.cli_calls import call


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["recipes"], 'Did you mean "recipe"?'),
        (["step", "evalute"], 'Did you mean "evaluate"?'),
        (["recipe", "shwo", "tiny"], 'Did you mean "show"?'),
        (["recipe", "show", "tinny"], 'Did you mean "tiny"?'),
        (["recipe", "show", "tiny", "--set", "stages.sft.epoch=1"], "epochs"),
        (["data", "build", "easy-vqq", "out"], 'Did you mean "easy-vqa"?'),
        (["ask", "manyeyes-tiny", "no.png", "what?"], "no.png"),
        (["run"], "pipelines/compiled"),
        (["run", "no.yaml"], "no.yaml"),
        (["pipeline", "compile", "train"], "pipelines/train.py"),
    ],
)
def test_wrong_input_is_explained_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert call(monkeypatch, *arguments) == 2
    assert expected in capsys.readouterr().err


def test_unknown_pipeline_offers_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "pipelines" / "compiled").mkdir(parents=True)
    (folder / "pipelines" / "compiled" / "train.yaml").touch()
    assert call(monkeypatch, "run", "trian") == 2
    assert 'Did you mean "train"?' in capsys.readouterr().err


def test_unknown_recipe_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "pipelines" / "compiled").mkdir(parents=True)
    (folder / "pipelines" / "compiled" / "train.yaml").touch()
    assert call(monkeypatch, "run", "--recipe", "tinny") == 2
    assert 'Did you mean "tiny"?' in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_recipe_show_json_is_the_recipe_with_its_digest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from manyeyes.recipe import load_recipe

    assert call(monkeypatch, "recipe", "show", "tiny", "--set", "seed=3", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["recipe"]["seed"] == 3
    assert shown["digest"] == load_recipe("tiny", overrides={"seed": 3}).digest


def test_recipe_list_names_every_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "recipe", "list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list_recipes()


def test_fusions_lists_every_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from manyeyes.fusion import FUSIONS

    assert call(monkeypatch, "fusions") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(FUSIONS)


def test_step_offers_the_arguments_that_a_person_gives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "step", "pretrain_projector", "--help") == 0
    shown = capsys.readouterr().out
    for option in ("--validation", "--encoder-checkpoints", "--recipe", "--set", "--data-md5", "--out"):
        assert option in shown
    for hidden in ("--recipe-json", "--code-digest", "--checkpoint "):
        assert hidden not in shown


def test_help_loads_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys; from manyeyes.cli.main import cli; "
        "print([m for m in ('torch', 'mlflow', 'kfp', 'pandas', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
