"""The very first step: everything that a run needs is looked at, and all that is wrong is said at once.

It asks for no GPU and reads no data beyond a few small files, so that a run that cannot succeed ends within seconds.
Never cached: it is about the world outside.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from manyeyes.errors import ManyEyesError, PreflightError
from manyeyes.harness.base import Reporter, Step, StepResult, telling_why
from manyeyes.harness.traces import pipeline_tags, result_tags
from manyeyes.pages import Table, Text, step_page
from manyeyes.recipe import Recipe
from manyeyes.registry.references import check_registry_name
from manyeyes.steps.judge_check import check_judge
from manyeyes.steps.preflight_checks import (
    Check,
    Need,
    RemoteData,
    check_data,
    check_disk,
    check_memory,
    check_sources,
    check_stages,
    estimate_recipe,
    find_data,
)
from manyeyes.steps.resolve_data import read_recipe

if TYPE_CHECKING:
    from manyeyes.registry.tracking import StepRun

_WORDS = {"ok": "fine", "warning": "warning", "problem": "wrong"}
_KINDS = {"ok": "good", "warning": "quiet", "problem": "bad"}


@dataclass
class _Findings:
    """What was looked at, in order."""

    checks: list[Check] = field(default_factory=list)
    retry: bool = False

    @contextmanager
    def collecting(self, subject: str) -> Iterator[None]:
        """Turn an error that a user can mend into a row, and go on behind the block."""
        try:
            yield
        except ManyEyesError as error:
            self.retry = self.retry or error.retry
            self.checks.append(Check(subject, "problem", error.found, error.needed, error.do))

    def of(self, state: Literal["ok", "warning", "problem"]) -> list[Check]:
        return [check for check in self.checks if check.state == state]


def preflight(
    reporter: Reporter,
    *,
    recipe: str,
    recipe_overrides: str = "",
    recipe_text: str = "",
    data_md5: str = "",
    data_remote: str = "",
    registry_model: str = "",
) -> StepResult:
    """Look at everything that a run needs, and say all that is wrong at once.

    The recipe and its parts, the snapshot in its remote, pretrained weights, the judge where a benchmark needs one
    (it is asked for one token), MLflow (something is really written, and removed), the registry's name, and disk and
    memory against the recipe's own estimate. What this machine cannot know (the memory of another node) is a warning
    and no error.

    Args:
        reporter: Shows the progress.
        recipe: A shipped recipe's name, the path of a YAML file, or the text of a recipe (YAML or JSON).
        recipe_overrides: One ``a.b=value`` a line.
        recipe_text: Text of a recipe, taken instead of ``recipe``; a cluster's form offers shipped names only there.
        data_md5: Snapshot; ``data.dvc`` of the working directory says it when empty.
        data_remote: A folder or ``s3://``; the default remote of the working directory when empty.
        registry_model: Name in the registry; the recipe's own when empty.

    Raises:
        PreflightError: Something is missing or wrong; ``problems`` says what.
    """
    found = _Findings()
    with ExitStack() as runs:
        log: StepRun | None = None
        with found.collecting("MLflow"):
            from manyeyes.registry.probe import probe
            from manyeyes.registry.tracking import step_run

            # The step's own run, and with it the first thing that MLflow has to take.
            log = runs.enter_context(step_run(reporter.step, tags=pipeline_tags()))
            runs.enter_context(telling_why(reporter.step, log))
            found.checks += _mlflow_rows(probe(log))
        _look(found, reporter, recipe_text or recipe, recipe_overrides, data_md5, data_remote, registry_model)
        sys.stderr.write(_as_text(found.checks))
        problems, warnings = found.of("problem"), found.of("warning")
        if problems:
            rows = [{name: getattr(check, name) for name in ("subject", "found", "needed", "do")} for check in problems]
            raise PreflightError(rows, retry=found.retry)
        figure = f"{len(found.checks)} checks, nothing wrong"
        if warnings:
            figure += f", {len(warnings)} warning{'s' if len(warnings) > 1 else ''}"
        if log is not None:
            log.set_tags(result_tags(figure, {}))
    return StepResult(
        figure=figure,
        metrics={"checks": float(len(found.checks)), "warnings": float(len(warnings))},
        html=step_page("Preflight", "What this run needs, and whether it is there.", {"": as_table(found.checks)}),
        markdown=as_table(found.checks).markdown() + "\n",
    )


def _look(
    found: _Findings,
    reporter: Reporter,
    recipe: str,
    recipe_overrides: str,
    data_md5: str,
    data_remote: str,
    registry_model: str,
) -> None:
    parsed: Recipe | None = None
    data: RemoteData | None = None
    need: Need | None = None
    with found.collecting("recipe"):
        parsed = read_recipe(recipe, recipe_overrides)
        found.checks += check_stages(parsed)
    if registry_model or parsed is not None:
        with found.collecting("registry name"):
            model = registry_model or (parsed.registry.model if parsed else "")
            check_registry_name(model)
            found.checks.append(Check("registry name", "ok", model))
    reporter.progress("looking for the snapshot", done=0.4)
    with found.collecting("data"):
        data = find_data(data_md5, data_remote)
        found.checks += check_data(data, parsed)
    if parsed is not None:
        found.checks += check_sources(parsed, data)
        with found.collecting("judge"):
            found.checks += check_judge(parsed)
        reporter.progress("estimating memory and disk", done=0.6)
        in_snapshot = parsed.model.language_model.source.removeprefix("scratch:").startswith("snapshot:")
        if data is not None or not in_snapshot:
            with found.collecting("model"):
                need = estimate_recipe(parsed, data)
    found.checks += check_disk(need, data)
    found.checks += check_memory(need)


def _mlflow_rows(left: Sequence[str]) -> list[Check]:
    rows = [Check("MLflow", "ok", "a run, an artifact and a registered model were written and removed")]
    for name in left:
        found = f"{name} could not be removed"
        rows.append(Check("MLflow", "warning", found, "nothing left of the probe", "Remove it by hand."))
    return rows


def as_table(checks: Sequence[Check]) -> Table:
    """What is wrong stands first."""
    rows: list[list[str | Text]] = [
        [Text(_WORDS[check.state], kind=_KINDS[check.state]), check.subject, check.found, check.needed, check.do]
        for check in _sorted(checks)
    ]
    return Table(("", "what", "found", "needed", "do"), rows, stacked=True)


def _as_text(checks: Sequence[Check]) -> str:
    lines = []
    for check in _sorted(checks):
        lines.append(f"{_WORDS[check.state]:<8} {check.subject}: {check.found}")
        pairs = (("needed", check.needed), ("do", check.do)) if check.state != "ok" else ()
        lines += [f"         {name:<7} {text}" for name, text in pairs if text]
    return "\n".join(lines) + "\n"


def _sorted(checks: Sequence[Check]) -> list[Check]:
    order = ("problem", "warning", "ok")
    return sorted(checks, key=lambda check: order.index(check.state))


STEP = Step("preflight", preflight, imports=("manyeyes.registry.tracking",), tracked=False)
