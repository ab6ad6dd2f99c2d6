"""Where results go: every place that a person may name, for every command that writes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import manyeyes
from manyeyes.cli.group import OutPath
from manyeyes.cli.main import cli
from manyeyes.errors import LockedError, StorageError
from manyeyes.storage import (
    check_out,
    file_lock,
    is_there,
    link_or_copy,
    new_file,
    new_folder,
    replaceable,
    wait_for_release,
    write_file,
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of each test, with a file, folders and links in it."""
    folder = tmp_path / "work"
    (folder / "full").mkdir(parents=True)
    (folder / "full" / "thesis.txt").write_text("years of work", encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / "file").write_text("a file", encoding="utf-8")
    (folder / "to-full").symlink_to("full")
    (folder / "to-nothing").symlink_to("not-yet")
    (folder / "circle").symlink_to("circle")
    monkeypatch.chdir(folder)
    return folder


# Neither a folder nor the place of one.
NO_FOLDER = [
    "file",
    "file/",
    "file/below",
    "file/below/more",
    "circle",
    "circle/x",
    "x" * 300,
    "x" * 300 + "/y",
    "x/" * 3000,
]
# Replacing these would take the ground from under the caller.
GROUND = [".", "./", "..", "/", "full/..", "//", "./."]


@pytest.mark.parametrize("out", [*NO_FOLDER, *GROUND])
def test_a_folder_cannot_be_made_where_none_can_be(out: str, place: Path) -> None:
    before = sorted(place.rglob("*"))
    with pytest.raises(StorageError) as refused, new_folder(Path(out)):
        pytest.fail("something would have been written")
    assert refused.value.do
    assert len(str(refused.value)) < 500
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("out", "where"),
    [
        ("new", "new"),
        ("new/", "new"),
        ("new/below/more", "new/below/more"),
        ("empty", "empty"),
        ("empty/", "empty"),
        ("full", "full"),
        ("./new", "new"),
        ("empty/../new", "new"),
        ("../work/new", "new"),
        ("to-full", "full"),
        ("to-nothing", "not-yet"),
        ("x" * 255, "x" * 255),
        ("ö" * 127, "ö" * 127),
    ],
)
def test_a_folder_appears_whole_under_its_name(out: str, where: str, place: Path) -> None:
    links = {path: path.readlink() for path in place.iterdir() if path.is_symlink()}
    with new_folder(Path(out)) as folder:
        (folder / "result").write_text("done", encoding="utf-8")
    assert [path.name for path in (place / where).iterdir()] == ["result"]
    assert {path: path.readlink() for path in links} == links
    assert not list(place.glob(".*"))


def test_an_interrupted_folder_leaves_what_was_there(place: Path) -> None:
    def interrupted() -> None:
        with new_folder(Path("full")) as folder:
            (folder / "half").write_text("", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in (place / "full").iterdir()] == ["thesis.txt"]
    assert not list(place.glob(".*"))


@pytest.mark.parametrize("out", ["file/x.json", "x" * 300, "x" * 300 + "/y.json", "circle/x.json", "full"])
def test_a_file_cannot_be_written_where_none_can_be(out: str) -> None:
    with pytest.raises(StorageError):
        write_file(Path(out), b"{}")


def test_a_file_may_have_a_name_as_long_as_the_file_system_takes() -> None:
    for name in ("x" * 255, "ö" * 127):
        write_file(Path(name), b"{}")
        assert Path(name).read_bytes() == b"{}"


def test_a_place_is_checked_without_making_anything(place: Path) -> None:
    before = sorted(place.rglob("*"))
    for out in (".", "..", "/tmp", "new", "new/below", "full", "to-full", "to-nothing"):
        check_out(Path(out))
    for out in ("new.npy", "full/new.npy", "file", "new/below/x.npy"):
        check_out(Path(out), file=True)
    for out in ("full", ".", "file/x.npy", "to-full"):
        with pytest.raises(StorageError):
            check_out(Path(out), file=True)
    assert sorted(place.rglob("*")) == before
    assert replaceable(Path("to-full")) == place / "full"


def test_a_place_without_permission_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place / "full" and mode)
    check_out(Path("empty/new"))
    for out in (place / "full", place / "full" / "new"):
        with pytest.raises(StorageError, match="Permission denied"):
            check_out(out)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "circle", "nul\0l", "file/x"])
def test_what_is_no_name_of_a_file_is_not_there(name: str) -> None:
    assert not is_there(Path(name))


# --- every command that writes -----------------------------------------------------------------------------------

ENDPOINT = ["--licence", "MIT", "--endpoint", "https://models.example/v1", "--model", "m"]
DESCRIBED = ["file", "OUT", "--images", "full", *ENDPOINT]
COMMANDS = {
    "pull": ["pull", "some-model", "OUT"],
    "data build": ["data", "build", "easy-vqa", "OUT"],
    "data validate": ["data", "validate", "full", "--out", "OUT"],
    "data contamination": ["data", "contamination", "full", "--benchmarks", "x", "--out", "OUT"],
    "data import": ["data", "import", "full", "OUT"],
    **{
        f"data generate {kind}": ["data", "generate", kind, *DESCRIBED]
        for kind in ("conversation", "detail", "complex", "llava-bench")
    },
    **{
        f"data generate {kind}": ["data", "generate", kind, "file", "OUT", *ENDPOINT]
        for kind in ("recaption", "dialogue-drawing")
    },
    "data generate engine": ["data", "generate", "engine", "OUT", "--links", "file", "--contact", "me", *ENDPOINT],
    "data curate": ["data", "curate", "clean", "OUT"],
    "data self-chat": ["data", "self-chat", "full", "OUT", "--licence", "MIT"],
    "evaluate": ["evaluate", "full", "--out", "OUT"],
    "score": ["score", "gqa", "--references", "file", "--predictions", "file", "--out", "OUT"],
    "judge": ["judge", "mm-vet", "--references", "file", "--predictions", "file", "--out", "OUT"],
    "compare": ["compare", "full", "full", "--out", "OUT"],
    "correlate": ["correlate", "file", "--out", "OUT"],
    "reliance": ["reliance", "full", "--out", "OUT"],
    "convert": ["convert", "full", "OUT"],
    "history": ["history", "some-model", "--html", "OUT"],
    "logits": ["logits", "full", "--prompt", "?", "--out", "OUT"],
    "step": [
        *("step", "gate", "--out", "OUT"),
        *(f"--{name}=full" for name in ("validation", "scorecard", "bundle-scorecard", "parity")),
    ],
    "pipeline status": ["pipeline", "status", "run", "--html", "OUT"],
    "pipeline compile": ["pipeline", "compile", "promote", "--out", "OUT"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("out", ["file/below", "x" * 300, "circle", "file/x/y"], ids=lambda out: out[:20])
def test_no_command_begins_where_it_cannot_write(command: str, out: str) -> None:
    with pytest.raises(StorageError):
        cli([out if word == "OUT" else word for word in COMMANDS[command]], standalone_mode=False)


def commands(group: click.Group, context: click.Context, prefix: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found |= commands(command, context, f"{prefix}{name} ")
        else:
            found[prefix + name] = command
    return found


def test_every_command_with_an_out_checks_it() -> None:
    unchecked = [
        name
        for name, command in commands(cli, click.Context(cli)).items()
        for parameter in command.params
        if parameter.name == "out" and not isinstance(parameter.type, OutPath)
    ]
    # `ask` writes with --draw alone: its default must not be asked of those who draw nothing. `handoff` checks its own
    # once it knows whether that is a file or a folder.
    assert unchecked == ["ask", "handoff"]


def test_there_is_a_case_for_every_command_with_an_out() -> None:
    found: Callable[[str], str] = lambda name: "step" if name.startswith("step ") else name  # noqa: E731
    checked = {
        found(name)
        for name, command in commands(cli, click.Context(cli)).items()
        if any(isinstance(parameter.type, OutPath) for parameter in command.params)
    }
    assert checked == set(COMMANDS)


def test_a_text_is_written_as_utf_8_and_others_may_read_it(place: Path) -> None:
    write_file(place / "new" / "x.json", "ö\n", flush=False)
    assert (place / "new" / "x.json").read_bytes() == b"\xc3\xb6\n"
    assert (place / "new" / "x.json").stat().st_mode & 0o777 == 0o644


def test_an_interrupted_file_leaves_what_was_there(place: Path) -> None:
    def interrupted() -> None:
        with new_file(place / "file") as file:
            file.write_text("half", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (place / "file").read_text(encoding="utf-8") == "a file"
    assert not list(place.glob(".*"))


def test_a_taken_lock_is_refused_with_its_owner_until_the_owner_ends(place: Path) -> None:
    def taken(owner: str) -> LockedError:
        return LockedError(f"process {owner}", "one", "Wait.")

    script = (
        "import sys, pathlib\nfrom manyeyes.errors import LockedError\nfrom manyeyes.storage import file_lock\n"
        "with file_lock(pathlib.Path('new/lock'), taken=lambda owner: LockedError(owner, '', '')):\n"
        "    print('mine', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"mine\n"
        with pytest.raises(LockedError, match=f"process {owner.pid};"), file_lock(Path("new/lock"), taken=taken):
            pytest.fail("two own it")
        owner.kill()
    wait_for_release(Path("new/lock"))
    with file_lock(Path("new/lock"), taken=taken):
        assert (place / "new" / "lock").read_text(encoding="utf-8") == f"{os.getpid()}\n"


def test_a_linked_file_takes_no_second_space_and_what_lay_there_keeps_its_other_name(place: Path) -> None:
    (place / "kept").hardlink_to(place / "file")
    link_or_copy(place / "to-full" / "thesis.txt", place / "file")
    link_or_copy(place / "to-full" / "thesis.txt", place / "file")
    assert (place / "file").samefile(place / "full" / "thesis.txt")
    assert (place / "kept").read_text(encoding="utf-8") == "a file"


def test_a_file_is_copied_where_it_cannot_be_linked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr("manyeyes.storage.os.link", refuse)
    link_or_copy(place / "file", place / "copy")
    assert (place / "copy").read_text(encoding="utf-8") == "a file"
    assert not (place / "copy").samefile(place / "file")


@pytest.mark.parametrize("call", ["fcntl.", "os.link(", "mkstemp(", "file_digest(", 'extra="forbid"'])
def test_no_other_module_does_what_is_done_in_one_place(call: str) -> None:
    found = {
        path.name for path in Path(manyeyes.__file__).parent.rglob("*.py") if call in path.read_text(encoding="utf-8")
    }
    assert found == {"strict.py" if "extra" in call else "storage.py"}
