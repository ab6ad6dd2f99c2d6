"""The registry on a SQLite store."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import BundleError, RecordError, RegistryError
from manyeyes.evaluation.scorecard import read_scorecard
from manyeyes.registry import carried, versions
from manyeyes.registry.gate import ChampionEvidence
from manyeyes.registry.references import ModelReference, find_alias
from manyeyes.registry.signing import CARD, SBOM
from manyeyes.registry.tracking import connect, step_run
from manyeyes.registry.versions import (
    RegisteredVersion,
    champion_evidence,
    comparable_champion,
    describe,
    parse_model_reference,
    promote,
    pull,
    rollback,
)
from manyeyes.runtime.bundle import GeneratedAnswer, Group
from manyeyes.runtime.bundle_contents import DECODER, REQUIRED_FILES, VISION
from manyeyes.runtime.preprocess import decode_image
from manyeyes.serving.hosting import RegistrySource
from tests.evaluation_fakes import RuleAnswerer, make_image, make_recipe, make_snapshot, rule_with_errors
from tests.registry_store import DECODER_Q4, IMAGES, add_variant, make_bundle, make_candidate, put, store_uri

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    uri = store_uri(tmp_path_factory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MANYEYES_PARENT_RUN_ID"):
            patch.delenv(name, raising=False)
        yield Path(uri.removeprefix("sqlite:///")).parent


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), images=IMAGES)


def tags_of(version: RegisteredVersion) -> dict[str, str]:
    return dict(connect().client.get_model_version(version.name, str(version.version)).tags)


def test_versions_are_promoted_rolled_back_and_pulled(snapshot: Snapshot, tmp_path: Path) -> None:
    name = "round-trip"
    assert champion_evidence(name, work_dir=tmp_path / "none") is None
    candidate = make_candidate(tmp_path / "one", snapshot)
    (tmp_path / "parity.json").write_text("{}", encoding="utf-8")
    first = put(name, candidate, tags={"git_commit": "abc"}, attachments=[tmp_path / "parity.json"])
    assert first == RegisteredVersion(name, 1, ("challenger", "champion"), "passed", created=True)
    tags = tags_of(first)
    assert tags["bundle_digest"] == candidate.digest
    assert (tags["gate"], tags["git_commit"], tags["recipe"], tags["data_md5"]) == ("passed", "abc", "tiny", "d" * 32)
    assert tags["score.easy-vqa"] == "100.00"

    # Its evidence comes back as it went in.
    evidence = champion_evidence(name, work_dir=tmp_path / "work")
    assert evidence is not None
    assert evidence.version == 1
    assert evidence.bundle_digest == candidate.digest
    assert evidence.scorecard == read_scorecard(candidate.bundle_scorecard)
    assert evidence.items.read_bytes() == candidate.items.read_bytes()
    kept = {path.name for path in evidence.items.parent.iterdir()}
    assert kept == {
        "scorecard.json",
        "bundle-scorecard.json",
        "items.parquet",
        "gate.json",
        "gate.html",
        "gate.md",
        "parity.json",
    }

    # The same bundle again is the same version.
    again = put(name, candidate)
    assert again == RegisteredVersion(name, 1, ("challenger", "champion"), "passed", created=False)
    assert len(connect().client.search_model_versions(f"name='{name}'")) == 1

    second = put(name, make_candidate(tmp_path / "two", snapshot, champion=evidence))
    assert (second.version, second.aliases) == (2, ("challenger", "champion"))
    assert describe(parse_model_reference(f"{name}@previous")).version == 1

    # The gate refuses the third: it is kept, no alias moves.
    third = put(name, make_candidate(tmp_path / "three", snapshot, floor=90, wrong=range(3)))
    assert (third.version, third.aliases, third.verdict) == (3, (), "failed")
    assert tags_of(third)["gate"] == "failed"
    assert "found 66.67%, needed at least 90%" in tags_of(third)["gate_reasons"]
    assert find_alias(connect(), name, "champion") == 2

    back = rollback(name)
    assert (back.version, back.aliases) == (1, ("champion",))
    assert find_alias(connect(), name, "previous") == 2
    # The pipeline that made version 2 runs again: what a person rolled back stays rolled back.
    put(name, make_candidate(tmp_path / "again" / "two", snapshot, champion=evidence))
    assert find_alias(connect(), name, "champion") == 1
    assert rollback(name).version == 2

    with pytest.raises(RegistryError, match="gate=failed"):
        promote(name, 3)
    assert promote(name, 3, force=True).aliases == ("champion",)
    assert tags_of(third)["promotion"] == "forced"
    assert promote(name, 1).aliases == ("champion",)
    assert find_alias(connect(), name, "previous") == 3

    bundle = pull(name, "champion", tmp_path / "pulled")
    assert (bundle / "manifest.json").read_bytes() == (candidate.bundle / "manifest.json").read_bytes()
    assert relative_files(bundle) == {*REQUIRED_FILES, "manifest.json", CARD, SBOM}
    assert pull(f"{name}/2", out_dir=tmp_path / "pulled") == tmp_path / "pulled"
    assert (tmp_path / "pulled" / "chat.json").read_text(encoding="utf-8") == "chat.json two"
    assert [path.name for path in tmp_path.glob(".pulled*")] == []


def test_a_failed_bundle_is_promoted_once_the_gate_passes_it(snapshot: Snapshot, tmp_path: Path) -> None:
    name = "second-chance"
    refused = make_candidate(tmp_path / "one", snapshot, floor=90, wrong=range(3))
    assert put(name, refused).aliases == ()
    shutil.rmtree(refused.bundle)
    allowed = make_candidate(tmp_path / "later" / "one", snapshot, floor=60, wrong=range(3))
    version = put(name, allowed)
    assert version == RegisteredVersion(name, 1, ("challenger", "champion"), "passed", created=False)
    assert tags_of(version)["gate"] == "passed"


def test_an_interrupted_promotion_is_finished(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "interrupted"
    candidate = make_candidate(tmp_path / "one", snapshot)

    class KilledError(Exception):
        pass

    def killed(*_: object, **__: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(versions, "_promote_by_gate", killed)
        with pytest.raises(KilledError):
            put(name, candidate)
    assert find_alias(connect(), name, "champion") is None
    assert put(name, candidate) == RegisteredVersion(name, 1, ("challenger", "champion"), "passed", created=False)


def test_of_versions_that_processes_made_of_one_bundle_at_once_the_oldest_stays(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, candidate = "twice", make_candidate(tmp_path / "one", snapshot)
    client = connect().client
    create, delete = mlflow.MlflowClient.create_model_version, mlflow.MlflowClient.delete_model_version
    calls: list[str] = []

    def create_thrice(self: mlflow.MlflowClient, *arguments: object, **named: object) -> object:
        for other in range(2):  # the other processes, which are a moment earlier
            create(self, *arguments, **named | {"source": f"s3://other/{other}", "run_id": None, "model_id": None})
        return create(self, *arguments, **named)

    def delete_twice(self: mlflow.MlflowClient, name: str, version: str) -> None:
        calls.append(version)
        delete(self, name, version)  # another process, which finds the same spare
        delete(self, name, version)

    monkeypatch.setattr(mlflow.MlflowClient, "create_model_version", create_thrice)
    monkeypatch.setattr(mlflow.MlflowClient, "delete_model_version", delete_twice)
    version = put(name, candidate)
    assert (version.version, version.created) == (1, False)
    assert sorted(calls) == ["2", "3"]
    assert [found.version for found in client.search_model_versions(f"name='{name}'")] == [1]


def test_a_champion_that_changed_since_the_gate_stops_the_promotion(snapshot: Snapshot, tmp_path: Path) -> None:
    name = "race"
    put(name, make_candidate(tmp_path / "one", snapshot))
    # Judged while there was no champion; version 1 became one meanwhile.
    with pytest.raises(RegistryError, match="is version 1 now; the gate compared version 2 with no champion") as error:
        put(name, make_candidate(tmp_path / "two", snapshot))
    assert error.value.retry
    assert find_alias(connect(), name, "champion") == 1
    # Judged again against version 1, the same bundle goes through.
    evidence = champion_evidence(name, work_dir=tmp_path / "work")
    version = put(name, make_candidate(tmp_path / "retry" / "two", snapshot, champion=evidence))
    assert (version.version, version.aliases, version.created) == (2, ("challenger", "champion"), False)


def test_evidence_about_another_bundle_is_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    one = make_candidate(tmp_path / "one", snapshot)
    two = make_candidate(tmp_path / "two", snapshot)
    two.gate = one.gate
    with pytest.raises(RegistryError, match="evidence about this very bundle"):
        put("mixed-up", two)
    with pytest.raises(RegistryError, match="no such model"):
        describe(parse_model_reference("mixed-up"))


def test_a_changed_bundle_is_not_registered(snapshot: Snapshot, tmp_path: Path) -> None:
    candidate = make_candidate(tmp_path / "one", snapshot)
    (candidate.bundle / DECODER).write_bytes(b"onnx/decoder_model_merged.onnx xne")
    with pytest.raises(BundleError, match=r"decoder_model_merged\.onnx has sha256"):
        put("changed", candidate)


@pytest.fixture(scope="module")
def registered(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> RegisteredVersion:
    return put("served", make_candidate(tmp_path_factory.mktemp("served") / "one", snapshot, wrong=range(1)))


def relative_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def stored_file(registered: RegisteredVersion, path: str) -> Path:
    version = connect().client.get_model_version(registered.name, str(registered.version))
    return Path(mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}/{path}"))


def test_a_corrupted_file_is_not_pulled(registered: RegisteredVersion, tmp_path: Path) -> None:
    stored = stored_file(registered, f"artifacts/bundle/{VISION}")
    content = stored.read_bytes()
    stored.write_bytes(content[:-1] + b"!")
    try:
        with pytest.raises(BundleError, match=r"vision_encoder\.onnx has sha256"):
            pull("served", "champion", tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    finally:
        stored.write_bytes(content)


def test_a_bundle_that_was_swapped_whole_is_not_pulled(registered: RegisteredVersion, tmp_path: Path) -> None:
    # File and manifest agree with each other, but not with what was registered.
    folder = stored_file(registered, "artifacts/bundle/manifest.json").parent
    before = {folder / name: (folder / name).read_bytes() for name in relative_files(folder)}
    other = make_bundle(tmp_path / "other", "another")
    try:
        for name in relative_files(other):
            (folder / name).write_bytes((other / name).read_bytes())
        with pytest.raises(BundleError, match="was registered"):
            pull("served", "champion", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def test_files_that_are_gone_from_the_store_are_named(registered: RegisteredVersion, tmp_path: Path) -> None:
    folder = stored_file(registered, "artifacts/bundle/manifest.json").parent
    away = folder.rename(folder.with_name("away"))
    try:
        with pytest.raises(RegistryError, match="artifacts/bundle of served/1 cannot be fetched"):
            pull("served", "champion", tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    finally:
        away.rename(folder)


def test_one_variant_is_pulled_without_the_files_of_the_others(snapshot: Snapshot, tmp_path: Path) -> None:
    bundle = add_variant(make_bundle(tmp_path / "exported", "whole"))
    put("with-variants", make_candidate(tmp_path / "one", snapshot, bundle=bundle))
    pulled = pull("with-variants", out_dir=tmp_path / "pulled", variant="int4")
    assert relative_files(pulled) == relative_files(bundle) - {DECODER} | {CARD, SBOM}
    assert (pulled / DECODER_Q4).read_bytes() == b"four bits"
    source = RegistrySource("with-variants", kept=tmp_path / "kept", variant="int3")
    with pytest.raises(BundleError, match=r'variant is "int3".*this bundle has default, int4'):
        source.fetch(source.find())
    assert list((tmp_path / "kept").iterdir()) == []
    assert (pull("with-variants", out_dir=tmp_path / "pulled") / DECODER).is_file()


def test_pull_leaves_a_folder_alone_that_is_no_bundle(registered: RegisteredVersion, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(RegistryError, match="is there and is no bundle"):
        pull("served", "champion", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_pull_mends_a_bundle_that_was_damaged(registered: RegisteredVersion, tmp_path: Path) -> None:
    bundle = pull("served", registered.version, tmp_path / "out")
    (bundle / DECODER).write_bytes(b"")
    pull("served", registered.version, tmp_path / "out")
    assert (bundle / DECODER).read_bytes() == b"onnx/decoder_model_merged.onnx one"


def test_a_champion_of_other_questions_is_scored_again(
    registered: RegisteredVersion, snapshot: Snapshot, tmp_path: Path
) -> None:
    recipe = make_recipe(evaluation__max_items=12)
    challenger = make_candidate(tmp_path / "cut", snapshot, evaluation__max_items=12)
    card = read_scorecard(challenger.bundle_scorecard)
    asked: list[Path] = []

    def make_answerer(bundle: Path) -> RuleAnswerer:
        asked.append(bundle)
        assert (bundle / "chat.json").read_text(encoding="utf-8") == "chat.json one"
        return RuleAnswerer(rule_with_errors(IMAGES, [0]), name="bundle")

    def compare(scorecard=card, recipe=recipe) -> ChampionEvidence | None:
        return comparable_champion(
            "served",
            scorecard=scorecard,
            recipe=recipe,
            snapshot=snapshot,
            code_digest="sha256:123",
            work_dir=tmp_path / "work",
            make_answerer=make_answerer,
        )

    evidence = compare()
    assert evidence is not None
    assert evidence.rescored
    digest = card.benchmarks["easy-vqa"].benchmark_digest
    assert evidence.scorecard.benchmarks["easy-vqa"].benchmark_digest == digest
    # Image 0 is wrong: 4 of the first 12 questions.
    assert evidence.scorecard.benchmarks["easy-vqa"].score == pytest.approx(100 * 8 / 12, abs=1e-3)
    assert len(asked) == 1
    # Kept: the gate, which is never cached, does not score it twice.
    assert compare() == evidence
    assert len(asked) == 1
    # On its own questions its registered evidence serves.
    whole = read_scorecard(make_candidate(tmp_path / "whole", snapshot).bundle_scorecard)
    unchanged = compare(whole, make_recipe())
    assert unchanged is not None
    assert not unchanged.rescored
    assert len(asked) == 1


def test_the_mlflow_model_answers(
    registered: RegisteredVersion, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[list[Group], int]] = []

    class FakeBundle:
        def answer_groups(self, groups: list[Group], *, max_new_tokens: int) -> list[list[GeneratedAnswer]]:
            calls.append((groups, max_new_tokens))
            return [[GeneratedAnswer(f"{len(g.images)} {question}", ()) for question in g.questions] for g in groups]

    loaded: list[Path] = []

    variants: list[str | None] = []

    def load(path: Path, variant: str | None = None) -> FakeBundle:
        loaded.append(path)
        variants.append(variant)
        return FakeBundle()

    monkeypatch.setattr("manyeyes.runtime.bundle.load_bundle", load)
    model = mlflow.pyfunc.load_model("models:/served@champion")
    assert (loaded[0] / "manifest.json").is_file()
    image = make_image(0).data
    (tmp_path / "image.png").write_bytes(image)
    rows = [
        {"image": image, "question": "a?"},
        {"image": make_image(1).data, "question": "b?"},
        {"image": str(tmp_path / "image.png"), "question": "c?"},
        {"image": base64.b64encode(image).decode(), "question": "d?"},
        {"image": "data:image/png;base64," + base64.b64encode(image).decode(), "question": "e?"},
        {"image": None, "question": "f?"},
    ]
    expected = ["1 a?", "1 b?", "1 c?", "1 d?", "1 e?", "0 f?"]
    assert list(model.predict(pd.DataFrame(rows))) == expected
    groups, max_new_tokens = calls[0]
    # Four rows show one image, however it was given: one group.
    assert [group.questions for group in groups] == [("a?", "c?", "d?", "e?"), ("b?",), ("f?",)]
    assert groups[0].images == (image,)
    assert max_new_tokens == 32
    assert list(model.predict(rows, params={"max_new_tokens": 5})) == expected
    assert calls[1][1] == 5
    assert list(model.predict(pd.DataFrame({"question": ["g?"]}))) == ["0 g?"]
    mlflow.pyfunc.load_model("models:/served@champion", model_config={"variant": "int4"})
    # What `mlflow models serve` takes.
    monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", '{"variant": "int8"}')
    mlflow.pyfunc.load_model("models:/served@champion")
    assert variants == ["default", "int4", "int8"]


def test_server_finds_and_fetches_what_the_alias_names_and_may_ask_for_approval(
    registered: RegisteredVersion, tmp_path: Path
) -> None:
    source = RegistrySource("served@champion", kept=tmp_path)
    assert (source.name, source.find()) == ("served", str(registered.version))
    assert (source.fetch(source.find()) / "manifest.json").is_file()
    strict = RegistrySource("served@champion", kept=tmp_path, require_approved=True)
    with pytest.raises(RegistryError, match="not approved"):
        strict.fetch(strict.find())
    with pytest.raises(RegistryError, match="not approved"):
        strict.admit(strict.find())
    with pytest.raises(RegistryError, match="no such alias"):
        RegistrySource("served@nobody", kept=tmp_path).find()


def test_server_keeps_the_bundle_that_answers_and_the_one_before(tmp_path: Path) -> None:
    for age, name in enumerate(["toy-1", "toy-10", "toy-2", "toy-3", "toy-3x", "toy-other-4", "other-1"]):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (age, age))
    source = RegistrySource("toy", kept=tmp_path)
    source.forget(["10"])
    others = {"toy-3x", "toy-other-4", "other-1"}
    assert {folder.name for folder in tmp_path.iterdir()} == {"toy-10", "toy-3", *others}, "the newest other one"
    (tmp_path / "toy-4").mkdir()
    source.forget(["4", "10"])
    assert {folder.name for folder in tmp_path.iterdir()} == {"toy-10", "toy-4", *others}


def test_the_mlflow_model_brings_its_own_code_and_asks_the_index_for_none_of_ours(
    registered: RegisteredVersion, tmp_path: Path
) -> None:
    model = Path(mlflow.artifacts.download_artifacts("models:/served@champion", dst_path=str(tmp_path / "model")))
    wanted = (model / "requirements.txt").read_text(encoding="utf-8")
    assert "manyeyes" not in wanted
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [line for line in project["dependencies"] if line.startswith("onnxruntime")] == list(carried._ONNX_RUNTIME)
    assert not list(model.rglob("__pycache__"))
    script = (
        "import sys\nfrom pathlib import Path\n"
        "sys.path = [path for path in sys.path if path and not (Path(path) / 'manyeyes').is_dir()]\n"
        "import mlflow.pyfunc\n"
        "try:\n    mlflow.pyfunc.load_model(sys.argv[1])\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
        "import manyeyes\nprint(manyeyes.__file__)\nassert 'torch' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(model)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=True,
    )
    error, home = done.stdout.split()[-2:]
    assert error == "BundleError", "this bundle is a toy of text files, which the carried code must say"
    assert Path(home) == model / "code" / "manyeyes" / "__init__.py"


def test_a_small_image_as_base64_is_no_name_of_a_file() -> None:
    """Between 255 and 4,096 characters without a slash, the file system refuses to look for such a name."""
    from manyeyes.registry.pyfunc_model import answer_rows

    class FakeBundle:
        def answer_groups(self, groups: list[Group], *, max_new_tokens: int) -> list[list[GeneratedAnswer]]:
            assert max_new_tokens == 8
            return [[GeneratedAnswer(f"{len(group.images[0])} bytes", ())] for group in groups]

    for size in (3, 150, 300, 3000, 300_000):
        row = {"image": base64.b64encode(bytes(size)).decode(), "question": "How large?"}
        assert answer_rows(FakeBundle(), [row], max_new_tokens=8) == [f"{size} bytes"]


def test_rows_take_pictures_and_pixels_and_name_the_row_of_what_is_none() -> None:
    from manyeyes.registry.pyfunc_model import answer_rows

    class FakeBundle:
        def answer_groups(self, groups: list[Group], *, max_new_tokens: int) -> list[list[GeneratedAnswer]]:
            assert max_new_tokens == 8
            shapes = [str([decode_image(image).shape for image in group.images]) for group in groups]
            return [
                [GeneratedAnswer(own, ())] * len(group.questions) for own, group in zip(shapes, groups, strict=True)
            ]

    pixels = np.zeros((2, 3, 3), np.uint8)
    rows = [{"image": image, "question": "?"} for image in (pixels, Image.fromarray(pixels), None, float("nan"), "")]
    shown = answer_rows(FakeBundle(), rows, max_new_tokens=8)
    assert shown == ["[(2, 3, 3)]"] * 2 + ["[]"] * 3
    for wrong in (pixels / 255, [[0, 1]], 7, {"bytes": b""}, "no file, no base64"):
        with pytest.raises(RecordError, match="row 1"):
            answer_rows(FakeBundle(), [rows[0], {"image": wrong, "question": "?"}], max_new_tokens=8)


def test_versions_belong_to_the_run_that_made_them(snapshot: Snapshot, tmp_path: Path) -> None:
    with step_run("register") as run:
        version = put("in-a-run", make_candidate(tmp_path / "one", snapshot), run_id=run.run_id)
    client = connect().client
    assert client.get_model_version("in-a-run", str(version.version)).run_id == run.run_id
    made = client.get_run(run.run_id)
    assert made.data.metrics["easy-vqa.score"] == 100
    assert [output.model_id for output in made.outputs.model_outputs]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tiny", ModelReference("tiny")),
        ("tiny@previous", ModelReference("tiny", "previous", None)),
        ("many-eyes.2/12", ModelReference("many-eyes.2", None, 12)),
        ("models:/tiny@champion", ModelReference("tiny", "champion", None)),
    ],
)
def test_references_are_read(text: str, expected: ModelReference) -> None:
    assert parse_model_reference(text) == expected


@pytest.mark.parametrize("text", ["", "@champion", "tiny@", "tiny/latest", "tiny/1@champion", "a b", "../tiny"])
def test_other_references_are_refused(text: str) -> None:
    with pytest.raises(RegistryError, match="NAME, NAME@ALIAS or NAME/VERSION"):
        parse_model_reference(text)


def test_unknown_names_say_what_there_is(registered: RegisteredVersion) -> None:
    with pytest.raises(RegistryError, match='Did you mean "served"'):
        describe(parse_model_reference("servd"))
    with pytest.raises(RegistryError, match=r'Did you mean "champion"\? It has: challenger \(version 1\)'):
        describe(parse_model_reference("served@champoin"))
    with pytest.raises(RegistryError, match="It has: 1"):
        describe(parse_model_reference("served/7"))
    with pytest.raises(RegistryError, match="no version is"):
        rollback("served")


def test_everything_is_written_beside_the_store(registered: RegisteredVersion, store: Path) -> None:
    assert stored_file(registered, "artifacts/bundle/manifest.json").is_relative_to(store / "mlartifacts")
    assert not Path("mlruns").exists()
    assert not Path("mlflow.db").exists()
