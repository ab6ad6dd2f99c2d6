"""The MLflow model of a version: bundle, evidence, card, SBOM and the code that serves it, logged in one piece."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.entities import LoggedModel, LoggedModelOutput, Metric

from manyeyes.evaluation.scorecard import Scorecard
from manyeyes.registry.carried import carried_requirements, carried_signature, copy_code
from manyeyes.registry.gate import GateReport, render_gate_html, render_gate_markdown
from manyeyes.registry.mlflow_errors import REQUEST, create_once, registry_errors
from manyeyes.registry.signing import BESIDE, sign_bundle, signing_key_is_given
from manyeyes.registry.tracking import Tracking
from manyeyes.runtime.bundle_contents import DEFAULT_VARIANT
from manyeyes.storage import link_or_copy


def log_model(
    tracking: Tracking,
    run_id: str,
    *,
    bundle: Path,
    evidence: Mapping[str, Path],
    beside: Mapping[str, str],
    report: GateReport,
    tags: Mapping[str, str],
) -> tuple[str, str]:
    """Make the MLflow model with bundle and evidence.

    Args:
        tracking: Where.
        run_id: Run that it belongs to.
        bundle: Its folder.
        evidence: Files to keep with it, by name.
        beside: Texts to put beside the bundle's own files, by name: card and SBOM. They are signed where
            ``MANYEYES_SIGNING_KEY`` is set.
        report: The gate's; kept as pages too.
        tags: Of the model.

    Returns:
        The model's id, and where its files are.

    Raises:
        RegistryError: MLflow or its artifact store refuses, or the key cannot sign.
        RegistryUnreachableError: One of them does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="manyeyes-register-") as name:
        staging = Path(name)
        # MLflow names artifact folders after their last path component, and follows no symbolic link out of them.
        ignore = shutil.ignore_patterns(*BESIDE)  # of another version, where the bundle was pulled
        shutil.copytree(bundle, staging / "bundle", copy_function=link_or_copy, ignore=ignore)
        for target, text in beside.items():
            (staging / "bundle" / target).write_text(text, encoding="utf-8")
        if signing_key_is_given():
            sign_bundle(staging / "bundle")
        (staging / "evidence").mkdir()
        for target, path in evidence.items():
            link_or_copy(path, staging / "evidence" / target)
        (staging / "evidence" / "gate.html").write_text(render_gate_html(report), encoding="utf-8")
        (staging / "evidence" / "gate.md").write_text(render_gate_markdown(report), encoding="utf-8")
        with registry_errors(), _quiet_mlflow() as pyfunc:
            logged = _create_model(tracking, run_id, tags)
            pyfunc.log_model(
                model_id=logged.model_id,
                name="bundle",
                python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                artifacts={"bundle": str(staging / "bundle"), "evidence": str(staging / "evidence")},
                signature=carried_signature(),
                model_config={"variant": DEFAULT_VARIANT},
                code_paths=[str(copy_code(staging / "code"))],
                pip_requirements=carried_requirements(),
            )
            tracking.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
    return str(logged.model_id), str(logged.artifact_location)


def _create_model(tracking: Tracking, run_id: str, tags: Mapping[str, str]) -> LoggedModel:
    marks = dict(tags) | {REQUEST: uuid.uuid4().hex}

    def create() -> LoggedModel:
        return tracking.client.create_logged_model(
            tracking.experiment_id, name="bundle", source_run_id=run_id, tags=marks, model_type="manyeyes-bundle"
        )

    def find() -> LoggedModel | None:
        with registry_errors():
            found = tracking.client.search_logged_models(
                [tracking.experiment_id], f"tags.`{REQUEST}` = '{marks[REQUEST]}'"
            )
        return found[0] if found else None

    return create_once(create, find=find)


@contextmanager
def _quiet_mlflow() -> Iterator[Any]:
    """``mlflow.pyfunc`` without what does not concern the user.

    Its import warns of MLflow's own classes, and logging wants an input example, for which it would load the bundle.
    ``log_model`` would also take the run in ``MLFLOW_RUN_ID`` for its own and end it; here ``source_run_id`` says which
    run it is.
    """
    injected = os.environ.pop("MLFLOW_RUN_ID", None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".*(is inferred as AnyType|An input example was not provided)", UserWarning
            )
            import mlflow.pyfunc  # takes a second, and nothing else here needs it

            yield mlflow.pyfunc
    finally:
        if injected is not None:
            os.environ["MLFLOW_RUN_ID"] = injected


def log_scores(tracking: Tracking, run_id: str, model_id: str, score: Scorecard) -> None:
    """Record a scorecard's figures on a run and its model.

    Raises:
        RegistryUnreachableError: The store does not answer any more.
    """
    metrics = [Metric(key, value, 0, 0, model_id=model_id, run_id=run_id) for key, value in score.metrics().items()]
    with registry_errors():
        tracking.client.log_batch(run_id, metrics=metrics)
