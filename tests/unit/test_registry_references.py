"""Every verb and step that takes MODEL[@ALIAS or /VERSION]: nothing that a person typed is left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from manyeyes.cli.main import cli
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import ManyEyesError, RegistryError, StorageError
from manyeyes.harness.base import Reporter
from manyeyes.registry.pull import champion_evidence, locate_model
from manyeyes.registry.references import ModelReference, check_registry_name, parse_model_reference
from manyeyes.registry.versions import promote, pull, read_aliases, rollback
from manyeyes.steps.evaluate import find_champion
from manyeyes.steps.plan_evaluation import plan_evaluation
from manyeyes.steps.promote_version import promote_version
from manyeyes.steps.restore_previous import restore_previous
from tests.evaluation_fakes import make_recipe, make_snapshot
from tests.registry_store import IMAGES, make_candidate, put, store_uri

NAME = "named"
REPORTER = Reporter("test")
ALIASES = {"challenger": 2, "champion": 2, "previous": 1}

# Each names no version of NAME, or two.
WRONG = [
    f"{NAME}/99",
    f"{NAME}/0",
    f"{NAME}/01",
    f"{NAME}/-1",
    f"{NAME}/+1",
    f"{NAME}/1.0",
    f"{NAME}/1e0",
    f"{NAME}/1 2",
    f"{NAME}/\N{ARABIC-INDIC DIGIT ONE}",
    f"{NAME}/\N{SUPERSCRIPT ONE}",
    f"{NAME}/{2**31}",
    f"{NAME}/{2**63}",
    f"{NAME}/{'9' * 5000}",
    f"{NAME}/",
    f"{NAME}//",
    f"{NAME}//1",
    f"{NAME}/1/",
    f"{NAME}/1/2",
    f"{NAME}/champion",
    f"{NAME}@",
    f"{NAME}@nobody",
    f"{NAME}@@champion",
    f"{NAME}@champion/",
    f"{NAME}@champion/1",
    f"{NAME}@champion@previous",
    f"{NAME}/1@champion",
    f"{NAME}/1@previous",
    f"{NAME} @champion",
    f"{NAME}:1",
    f"models:/{NAME}/99",
    f"models:/{NAME}//1",
    f"models:/{NAME}/1@champion",
    "models:/",
    "models://" + NAME,
    f"/{NAME}/1",
    "/1",
    "@champion",
    "/",
    "@",
    "",
    " ",
    "no-such-model",
    "no-such-model/1",
]


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store_uri(tmp_path_factory))
        patch.setenv("MANYEYES_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MANYEYES_PARENT_RUN_ID"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), images=IMAGES)


@pytest.fixture(scope="module")
def digests(store: None, snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Digest of each version's bundle; version 1 was champion, version 2 is."""
    folder = tmp_path_factory.mktemp("candidates")
    first, second = (make_candidate(folder / name, snapshot) for name in ("one", "two"))
    put(NAME, first)
    second = make_candidate(
        folder / "again", snapshot, bundle=second.bundle, champion=champion_evidence(NAME, work_dir=folder)
    )
    put(NAME, second)
    assert read_aliases(NAME) == ALIASES
    return {1: first.digest, 2: second.digest}


def typed(*arguments: str) -> Callable[[str], object]:
    """A command line with the reference in the place of MODEL."""
    return lambda text: cli([text if word == "MODEL" else word for word in arguments], standalone_mode=False)


VERBS: dict[str, Callable[[str], object]] = {
    "pull": typed("pull", "--", "MODEL", "out"),
    "promote": typed("promote", "--", "MODEL"),
    "promote --force": typed("promote", "--force", "--", "MODEL"),
    "rollback": typed("rollback", "--", "MODEL"),
    "ask": typed("ask", "--", "MODEL", "-", "What?"),
    "evaluate": typed("evaluate", "--", "MODEL"),
    "compare, first": typed("compare", "--", "MODEL", NAME),
    "compare, second": typed("compare", "--", NAME, "MODEL"),
    "step fetch-model": typed(
        *("step", "fetch-model", "--kind", "bundle", "--model", "MODEL", "--model-digest", "d" * 64)
    ),
    "restore_previous": lambda text: restore_previous(REPORTER, model=text, reason="why not"),
    "promote_version, model": lambda text: promote_version(REPORTER, model=text, version="1", reason="why not"),
    "plan_evaluation": lambda text: plan_evaluation(
        REPORTER,
        evaluate_model=text,
        evaluate_benchmarks="",
        recipe=make_recipe().canonical_json(),
        data_md5="0" * 32,
        data_remote="nowhere",
    ),
    "locate_model": locate_model,
    "pull, Python": lambda text: pull(text, out_dir=Path("out")),
    "pull, Python, two": lambda text: pull(text, "champion", Path("out")),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("text", WRONG, ids=lambda text: repr(text[:40]))
def test_what_names_no_version_is_refused_by_every_verb(
    verb: str, text: str, digests: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ManyEyesError, click.ClickException)):
        VERBS[verb](text)
    assert read_aliases(NAME) == ALIASES
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", ["99", "0", "", " ", "1/2", "1@champion", "nobody", "/1", "@champion", "\u0661"])
def test_a_version_beside_the_name_is_read_whole(version: str, digests: dict[int, str], tmp_path: Path) -> None:
    for refuse in (
        lambda: promote_version(REPORTER, model=NAME, version=version, reason="why not", force=True),
        lambda: promote(NAME, version, force=True),
        lambda: rollback(NAME, version),
        lambda: pull(NAME, version, tmp_path / "out"),
    ):
        with pytest.raises(RegistryError):
            refuse()
    assert read_aliases(NAME) == ALIASES


@pytest.mark.parametrize("both", [f"{NAME}/1", f"{NAME}@previous", f"{NAME}@champion"])
def test_a_version_in_the_name_and_another_beside_it_are_refused(both: str, digests: dict[int, str]) -> None:
    for which in (1, 2, "champion"):
        for verb in (promote, rollback, pull):
            with pytest.raises(RegistryError, match="NAME, NAME@ALIAS or NAME/VERSION"):
                verb(both, which)
    assert read_aliases(NAME) == ALIASES


@pytest.mark.parametrize(
    ("text", "version"),
    [("", 2), ("/1", 1), ("/2", 2), ("@champion", 2), ("@challenger", 2), ("@previous", 1)],
)
@pytest.mark.parametrize("prefix", ["", "models:/", " "])
def test_the_version_that_was_named_is_the_one_that_comes(
    text: str, version: int, prefix: str, digests: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reference = f"{prefix}{NAME}{text}"
    bundle = pull(reference, out_dir=tmp_path / "out")
    assert json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["digest"] == digests[version]
    located = locate_model(reference)
    assert (located.place, located.digest) == (f"models:/{NAME}/{version}", digests[version])
    cli(["compare", reference, reference, "--out", str(tmp_path / "compared")], standalone_mode=False)
    compared = json.loads((tmp_path / "compared" / "compare.json").read_text(encoding="utf-8"))
    assert f"{NAME}/{version}" in json.dumps(compared)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (".", "working directory"),
        ("..", "working directory"),
        ("/", "working directory"),
        ("mine", "is there and is no bundle"),
        ("mine/thesis.txt", "is a file"),
        ("mine/thesis.txt/below", "thesis.txt is a file"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_bundle_is_not_pulled_over_what_is_no_bundle(
    out: str, said: str, digests: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((RegistryError, StorageError), match=said):
        pull(NAME, out_dir=Path(out))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "thesis.txt"]


@pytest.mark.parametrize("out", ["new", "new/", "a/b/c", "empty", "to-empty", "to-nothing", "x" * 255])
def test_a_bundle_is_pulled_to_where_it_was_wanted(
    out: str, digests: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "to-empty").symlink_to("empty")
    (tmp_path / "to-nothing").symlink_to("not-yet")
    monkeypatch.chdir(tmp_path)
    for version in (1, 2, 2):
        assert pull(NAME, version, Path(out)) == Path(out)
        assert json.loads((Path(out) / "manifest.json").read_text(encoding="utf-8"))["digest"] == digests[version]
    assert (tmp_path / "to-empty").is_symlink()
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("text", [f"{NAME}/2", f"{NAME}@champion", f"{NAME}@challenger"])
def test_a_rollback_to_another_version_than_the_previous_is_refused(text: str, digests: dict[int, str]) -> None:
    for refuse in (rollback, lambda text: restore_previous(REPORTER, model=text, reason="why not")):
        with pytest.raises(RegistryError, match=r"version 1, which was champion before.*manyeyes promote named/2"):
            refuse(text)
    assert read_aliases(NAME) == ALIASES


@pytest.mark.parametrize("text", [NAME, f"{NAME}/1", f"{NAME}@previous"])
def test_a_rollback_may_name_the_version_that_it_restores(text: str, digests: dict[int, str]) -> None:
    restore_previous(REPORTER, model=text, reason="back")
    assert read_aliases(NAME) == {"challenger": 2, "champion": 1, "previous": 2}
    assert rollback(f"{NAME}/2").version == 2
    assert read_aliases(NAME) == ALIASES


def test_a_report_compares_with_the_champion_that_was_found_before(digests: dict[int, str]) -> None:
    assert find_champion(f"{NAME}/1").name == f"{NAME} version 1"
    assert find_champion(NAME).name == f"{NAME} version 2"
    gone = find_champion(f"{NAME}/99")
    assert gone.scorecard is None
    assert "could not be read" in gone.reason
    for text in (f"{NAME}@champion", f"{NAME}//", "../named"):
        with pytest.raises(RegistryError):
            find_champion(text)


@pytest.mark.parametrize("text", [f"{NAME}/1", f"{NAME}@champion", f"{NAME}/", "../named", "a:b", ""])
def test_the_gate_does_not_take_a_name_that_cannot_be_for_a_model_without_a_champion(text: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="letters, digits"):
        champion_evidence(text, work_dir=tmp_path)
    with pytest.raises(RegistryError, match="letters, digits"):
        check_registry_name(text)


def test_a_reference_is_written_as_it_is_read() -> None:
    for text in ("a@champion", "a@previous", "a.b-c_1/12"):
        assert str(parse_model_reference(text)) == text
    assert str(ModelReference("a")) == "a@champion"
