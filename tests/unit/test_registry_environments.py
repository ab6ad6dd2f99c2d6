"""A version goes from one registered model, or one store, to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from manyeyes.data.snapshot import Snapshot
from manyeyes.data.validation_report import ValidationReport
from manyeyes.errors import RegistryError
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.export.parity import ParityFigures, ParityReport
from manyeyes.registry.environments import copy_version
from manyeyes.registry.references import parse_model_reference
from manyeyes.registry.tracking import connect
from manyeyes.registry.versions import champion_evidence, describe, read_aliases
from manyeyes.runtime.bundle_contents import read_manifest, variant_digest
from manyeyes.steps.register import _variant_evidence
from tests.cli_calls import call
from tests.evaluation_fakes import RuleAnswerer, make_recipe, make_snapshot, rule_with_errors
from tests.registry_moves import check_explained
from tests.registry_store import IMAGES, Candidate, add_variant, make_bundle, make_candidate, put, store_uri


@pytest.fixture(autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri(tmp_path_factory))
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MANYEYES_PARENT_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return store_uri(tmp_path_factory)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), images=IMAGES)


FIGURES: dict[str, Any] = {
    "items": 9,
    "token_match": 1,
    "max_abs_logit": 0,
    "mean_abs_logit": 0,
    "max_new_tokens": 9,
    "providers": ["CPUExecutionProvider"],
    "mismatches": [],
}


def with_evidence(candidate: Candidate, *, approval: bool = False, int4: bool = False) -> list[Path]:
    """What the step register keeps with a version, beside what every candidate has."""
    rounded = ParityFigures(precision="decoder int4", **FIGURES)
    recipe = make_recipe(
        gate=[
            {"rule": "non-inferiority", "benchmark": "easy-vqa", "margin": -5},
            {"rule": "parity", "token_match": 1, "max_abs_logit": 1, "max_score_difference": 1},
            {"rule": "validation"},
            {"rule": "precision", "margin": -5},
        ],
        registry__promotion="approval" if approval else "automatic",
    )
    parity = ParityReport(**FIGURES, variants={"int4": rounded} if int4 else {})
    validation = ValidationReport(
        verdict="passed",
        data_md5="d" * 32,
        suite="s",
        suite_sha256="0" * 64,
        datasets={},
        eval_datasets=(),
        rows=9,
        quarantined=0,
        contaminated_images=0,
        expectations=(),
    )
    folder = candidate.gate.parent
    texts = {
        "recipe.json": recipe.canonical_json(),
        "parity.json": parity.model_dump_json(),
        "validation.json": validation.model_dump_json(),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def test_a_version_is_judged_where_it_arrives(
    snapshot: Snapshot, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = make_candidate(tmp_path / "good", snapshot)
    put("dev", good, attachments=with_evidence(good))
    cache = tmp_path / "cache"

    with pytest.raises(RegistryError, match=r"https://\*\*\*@there, with a password") as raised:
        copy_version(parse_model_reference("dev/1"), "prod", to_uri="https://me:secret@there", cache_dir=cache)
    assert "secret" not in str(raised.value)
    with pytest.raises(RegistryError, match="is where dev/1 is"):
        copy_version(parse_model_reference("dev/1"), "dev", cache_dir=cache)
    copied = copy_version(parse_model_reference("dev@champion"), "prod", cache_dir=cache)
    assert (copied.name, copied.version, copied.aliases, copied.verdict) == (
        "prod",
        1,
        ("challenger", "champion"),
        "passed",
    )
    tags = connect().client.get_model_version("prod", "1").tags
    assert (tags["copied_from"], tags["bundle_digest"]) == ("models:/dev/1", good.digest)
    theirs = champion_evidence("prod", work_dir=tmp_path / "prod")
    assert theirs is not None
    assert {"recipe.json", "parity.json", "validation.json"} <= {path.name for path in theirs.items.parent.iterdir()}
    check_explained("prod")

    # Good enough for dev, where somebody forced it, and not for prod, whose champion it is compared with.
    poor = make_candidate(
        tmp_path / "poor", snapshot, wrong=range(3), champion=champion_evidence("dev", work_dir=tmp_path)
    )
    put("dev", poor, attachments=with_evidence(poor))
    monkeypatch.setenv("MANYEYES_CACHE", str(cache))
    assert call(monkeypatch, "promote", "dev/2", "--to", "prod") == 3
    assert "prod version 2 is now without an alias (gate: failed)" in capsys.readouterr().out
    assert read_aliases("prod") == {"challenger": 1, "champion": 1}
    assert "non-inferiority" in connect().client.get_model_version("prod", "2").tags["gate_reasons"]

    # Another store under the same name, which asks for approval.
    other = f"sqlite:///{tmp_path}/other/mlflow.db"
    careful = make_candidate(tmp_path / "careful", snapshot, champion=champion_evidence("dev", work_dir=tmp_path))
    put("dev", careful, attachments=with_evidence(careful, approval=True))
    assert copy_version(parse_model_reference("dev/3"), "dev", to_uri=other, cache_dir=cache).aliases == ("challenger",)
    assert connect().uri == store
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    assert describe(parse_model_reference("dev@challenger")).version == 1


def test_variants_are_judged_where_they_arrive(snapshot: Snapshot, tmp_path: Path) -> None:
    bundle = add_variant(make_bundle(tmp_path / "exported", "two precisions"))
    candidate = make_candidate(tmp_path / "one", snapshot, bundle=bundle)
    evaluate(
        RuleAnswerer(rule_with_errors(IMAGES, range(3)), name="bundle"),
        make_recipe(),
        snapshot=snapshot,
        out_dir=tmp_path / "bundle" / "variants" / "int4",
        code_digest="c",
        model_digest=variant_digest(read_manifest(bundle), "int4"),
    )
    kept = _variant_evidence(candidate.scorecard.parent, tmp_path / "bundle", tmp_path)
    put("dev-int4", candidate, attachments=[*with_evidence(candidate, int4=True), *kept])
    copied = copy_version(parse_model_reference("dev-int4/1"), "prod-int4", cache_dir=tmp_path / "cache")
    assert copied.verdict == "failed"
    reasons = connect().client.get_model_version("prod-int4", "1").tags["gate_reasons"]
    assert "precision" in reasons
    assert "int4 on easy-vqa: -33.33 points" in reasons
    assert "parity" not in reasons


def test_a_version_without_the_evidence_of_the_gate_is_not_copied(snapshot: Snapshot, tmp_path: Path) -> None:
    put("bare", make_candidate(tmp_path / "one", snapshot))
    with pytest.raises(RegistryError, match=r"without recipe\.json, parity\.json, validation\.json"):
        copy_version(parse_model_reference("bare/1"), "bare-prod", cache_dir=tmp_path / "cache")
