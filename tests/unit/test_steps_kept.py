"""What is kept between commands: found again, made again where it is damaged, done without where it cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from manyeyes.cli.main import cli
from manyeyes.harness import kept as kept_module
from manyeyes.harness.kept import keep_dir, kept
from tests.model_toys import toy_spec, write_language_model


class Maker:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        return f"text {self.calls}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "toys"


def test_text_is_made_once_for_each_thing_it_is_made_of(folder: Path) -> None:
    make = Maker()
    assert [kept("toys", "a", make=make), kept("toys", "a", make=make)] == ["text 1", "text 1"]
    assert kept("toys", "b", make=make) == "text 2"
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("changed", ["code", "torch"])
def test_other_code_and_another_torch_make_it_again(
    changed: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Maker()
    kept("toys", make=make)
    if changed == "code":
        monkeypatch.setenv("MANYEYES_IMAGE_DIGEST", "sha256:other")
    else:
        monkeypatch.setattr(kept_module.metadata, "version", lambda name: f"other {name}")
    assert kept("toys", make=make) == "text 2"


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"text": "text 9"}',
        b'{"sha256": "0", "text": "text 9"}',
        b'{"text": 1, "sha256": 1}',
    ],
)
def test_damaged_file_is_made_again(damage: bytes, folder: Path) -> None:
    make = Maker()
    kept("toys", make=make)
    (file,) = folder.iterdir()
    file.write_bytes(damage)
    assert kept("toys", make=make) == "text 2"
    assert kept("toys", make=make) == "text 2"


def test_folder_that_cannot_be_written_is_done_without(folder: Path) -> None:
    folder.parent.write_text("a file where the folder should be", encoding="utf-8")
    make = Maker()
    assert [kept("toys", make=make), kept("toys", make=make)] == ["text 1", "text 2"]


def test_oldest_files_go_when_there_are_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "_MOST_FILES", 3)
    for name in "abcdef":
        kept("toys", name, make=Maker())
    assert len(list(folder.iterdir())) == 3


def test_users_cache_folder_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANYEYES_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert keep_dir() == Path("/somewhere/manyeyes")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert keep_dir() == Path("/home/me/.cache/manyeyes")


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "timm", "mlflow"):
    sys.modules[name] = None
from manyeyes.cli.main import cli
cli(sys.argv[1:])
"""


def test_second_answer_is_the_same_and_loads_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    model = json.dumps(toy_spec(write_language_model(tmp_path / "lm")).model_dump(mode="json"))
    for arguments in (
        ["recipe", "show", "tiny", "--set", f"model={model}", "--json"],
        ["recipe", "show", "tiny", "--set", f"model={model}"],
        ["recipe", "list"],
        ["encoders"],
        ["encoders", "clip-l14-336"],
        ["encoders", "--json"],
        ["fusions"],
        ["fusions", "channel-concat"],
        ["projectors"],
        ["projectors", "mlp"],
    ):
        first = CliRunner().invoke(cli, arguments)
        assert first.exit_code == 0, first.output
        command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
        second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert second.stdout == first.stdout
        assert "not_estimated" not in first.stdout
        assert "not known here" not in first.stdout


def test_another_language_model_in_the_same_folder_is_estimated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    place = write_language_model(tmp_path / "lm")
    model = json.dumps(toy_spec(place).model_dump(mode="json"))

    def parameters() -> int:
        shown = CliRunner().invoke(cli, ["recipe", "show", "tiny", "--set", f"model={model}", "--json"])
        return int(json.loads(shown.stdout)["parameters"]["language_model"])

    before = parameters()
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] += 1
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert parameters() > before
