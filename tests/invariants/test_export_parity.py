"""What a parity report sees, and where it is kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

from manyeyes.errors import EvaluationError
from manyeyes.export.bundle import record_parity
from manyeyes.export.parity import measure_parity
from manyeyes.runtime.bundle import Group, load_bundle
from manyeyes.runtime.bundle_contents import DECODER
from tests.export_toys import VOCABULARY, Toy, make_groups, rewrite_manifest


def test_recorded_parity_stands_in_the_manifest_and_leaves_the_digest(toy_bundle: Toy, tmp_path: Path) -> None:
    shutil.copytree(toy_bundle.bundle, tmp_path / "bundle")
    report = measure_parity(toy_bundle.checkpoint, tmp_path / "bundle", make_groups(), items=3, max_new_tokens=2)
    assert report.items == 3
    record_parity(tmp_path / "bundle", report)
    recorded = load_bundle(tmp_path / "bundle").manifest
    assert recorded["parity"]["token_match"] == report.token_match
    assert recorded["digest"] == toy_bundle.manifest.digest


def test_parity_sees_a_bundle_of_other_weights(toy_bundle: Toy, tmp_path: Path) -> None:
    """A report that is always good would be worth nothing."""
    shutil.copytree(toy_bundle.bundle, tmp_path / "bundle")
    model = onnx.load(tmp_path / "bundle" / DECODER)
    heads = [tensor for tensor in model.graph.initializer if sorted(tensor.dims) == [32, VOCABULARY]]
    assert len(heads) == 1
    values = onnx.numpy_helper.to_array(heads[0])
    heads[0].CopyFrom(onnx.numpy_helper.from_array(-values, heads[0].name))
    onnx.save(model, tmp_path / "bundle" / DECODER)
    rewrite_manifest(tmp_path / "bundle")
    report = measure_parity(toy_bundle.checkpoint, tmp_path / "bundle", make_groups(), items=5, max_new_tokens=4)
    assert report.token_match < 1.0
    assert report.max_abs_logit > 0.1
    assert len(report.mismatches) == round(5 * (1 - report.token_match))


def test_parity_without_questions_is_refused(toy_bundle: Toy) -> None:
    with pytest.raises(EvaluationError, match="no question"):
        measure_parity(toy_bundle.checkpoint, toy_bundle.bundle, [Group((), ())], items=5, max_new_tokens=4)
