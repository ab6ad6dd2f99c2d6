"""A store for all registry tests of a process, because MLflow takes seconds to make one, and what to put into it."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from manyeyes.data.snapshot import Snapshot
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.recipe.gate_rules import FloorRule
from manyeyes.registry.gate import ChampionEvidence, decide, write_gate_report
from manyeyes.registry.tracking import connect
from manyeyes.registry.versions import RegisteredVersion, register
from manyeyes.runtime.bundle_contents import DECODER, DEFAULT_VARIANT, EMBED, REQUIRED_FILES, VISION, digest_files
from tests.evaluation_fakes import RuleAnswerer, make_recipe, rule_with_errors

IMAGES = 9
_URIS: list[str] = []


DECODER_Q4 = "onnx/decoder_model_merged_q4.onnx"


def store_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tracking URI of the store, in a folder that did not exist before."""
    if not _URIS:
        uri = f"sqlite:///{tmp_path_factory.mktemp('registry')}/deep/mlflow.db"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", uri)
            connect(create=True)
        _URIS.append(uri)
    return _URIS[0]


def make_bundle(folder: Path, content: str, *, decoder_bytes: int = 0) -> Path:
    """A folder that is a bundle as far as checksums go; its decoder has this many bytes at least."""
    folder.mkdir(parents=True)
    files = {}
    for name in REQUIRED_FILES:
        data = f"{name} {content}".encode()
        if name == DECODER:
            data += random.Random(content).randbytes(max(0, decoder_bytes - len(data)))
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    graphs = {"vision": [VISION], "embed": [EMBED], "decoder": [DECODER]}
    manifest = {
        "format_version": 1,
        "recipe": "tiny",
        "recipe_digest": "r" * 64,
        "data_md5": "d" * 32,
        "code_digest": "c" * 64,
        "checkpoint_digest": "k" * 64,
        "opset": 20,
        "precision": "fp32",
        "graphs": {},
        "variants": {DEFAULT_VARIANT: {"precision": dict.fromkeys(graphs, "fp32"), "graphs": graphs}},
        "files": files,
        "digest": digest_files(files),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def add_variant(bundle: Path) -> Path:
    """Give a bundle of ``make_bundle`` the variant ``int4``, whose decoder is another file."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    (bundle / DECODER_Q4).write_bytes(b"four bits")
    manifest["files"][DECODER_Q4] = {"sha256": hashlib.sha256(b"four bits").hexdigest(), "bytes": 9}
    whole = manifest["variants"][DEFAULT_VARIANT]
    manifest["variants"]["int4"] = {
        "graphs": whole["graphs"] | {"decoder": [DECODER_Q4]},
        "precision": whole["precision"] | {"decoder": "int4"},
    }
    manifest["digest"] = digest_files(manifest["files"])
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return bundle


@dataclass
class Candidate:
    """Everything that register takes."""

    bundle: Path
    scorecard: Path
    bundle_scorecard: Path
    items: Path
    gate: Path

    @property
    def digest(self) -> str:
        return str(json.loads((self.bundle / "manifest.json").read_text(encoding="utf-8"))["digest"])


def make_candidate(
    folder: Path,
    snapshot: Snapshot,
    *,
    floor: float = 0,
    champion: ChampionEvidence | None = None,
    wrong: range = range(0),
    bundle: Path | None = None,
    decoder_bytes: int = 0,
    **recipe: object,
) -> Candidate:
    bundle = bundle or make_bundle(folder / "exported", folder.name, decoder_bytes=decoder_bytes)
    digest = str(json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["digest"])
    cards = {
        kind: evaluate(
            RuleAnswerer(rule_with_errors(IMAGES, wrong), name=kind),
            make_recipe(**recipe),
            snapshot=snapshot,
            out_dir=folder / kind,
            code_digest="c",
            model_digest="k" * 64 if kind == "torch" else digest,
        )
        for kind in ("torch", "bundle")
    }
    report = decide(
        [FloorRule(rule="floor", benchmark="easy-vqa", at_least=floor)],
        scorecard=cards["torch"],
        bundle_scorecard=cards["bundle"],
        parity=None,
        validation=None,
        items=folder / "bundle/items.parquet",
        champion=champion,
    )
    write_gate_report(report, folder / "gate.json")
    return Candidate(
        bundle,
        folder / "torch/scorecard.json",
        folder / "bundle/scorecard.json",
        folder / "bundle/items.parquet",
        folder / "gate.json",
    )


def put(name: str, candidate: Candidate, **options: object) -> RegisteredVersion:
    return register(
        name,
        bundle=candidate.bundle,
        scorecard=candidate.scorecard,
        bundle_scorecard=candidate.bundle_scorecard,
        items=candidate.items,
        gate=candidate.gate,
        **options,
    )
