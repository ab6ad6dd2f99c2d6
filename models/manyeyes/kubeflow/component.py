"""What every component calls: from the arguments that kfp gives it to the step, and back to kfp's output parameters.

A component's source travels in its pipeline, six copies of it a task (``sizes.py``), so all of it that can stand here
does.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import sys
import tempfile
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from manyeyes.harness.base import Reporter, Step, StepResult, run_step
from manyeyes.harness.inputs import PINNING_STEPS

# What every component's source needs; a compiled pipeline leaves it out (``compact.py``).
PRELUDE = """\
from typing import NamedTuple
from kfp import dsl
from manyeyes.kubeflow.component import run_component
"""


def run_component(
    name: str,
    arguments: Mapping[str, Any],
    component: Any = None,
    *,
    label: str = "",
    kind: str = "",
    report: str = "report",
    once: bool = False,
) -> Any:
    """Run a step with a component's arguments.

    Args:
        name: The step's name.
        arguments: The component's own arguments, by name: plain values, and artifacts, which have a path. The step
            function gets the values and the paths under the same names.
        component: The component's function, where it has output parameters: the compiled one has those of the step's
            that its pipeline reads.
        label: Tells apart two tasks of one step.
        kind: Which of the module's ``STEPS`` is run; its only ``STEP`` when empty.
        report: Which argument is the step's page, where a component runs two steps.
        once: Whether a further attempt in the same pod takes the step as it ended there.

    Returns:
        The step's output parameters that the component has, by name.
    """
    module = importlib.import_module(f"manyeyes.steps.{name}")
    step: Step = module.STEPS[kind] if kind else module.STEP
    if name in PINNING_STEPS:
        step = _refusing_too_large(step)
    page = arguments[report]
    outputs = {key: arguments[key] for key in step.outputs}
    ended = Path(f"{page.path}.{name}-ended")
    if once and ended.is_file():
        kept = json.loads(ended.read_text(encoding="utf-8"))
        for key, artifact in {report: page, **outputs}.items():
            artifact.metadata.update(kept[key])
        return None
    taken = inspect.signature(step.function).parameters
    # kfp gives None for an optional artifact that nobody passed: the function's own default counts.
    given = {key: _plain(arguments[key]) for key in taken if key not in step.outputs and arguments.get(key) is not None}
    shown = {} if report != "report" else {key: arguments[key] for key in ("metrics", "notes") if key in arguments}
    result = run_step(step, report=page, **shown, label=label, outputs=outputs, **given)
    if once:
        kept = {key: artifact.metadata for key, artifact in {report: page, **outputs}.items()}
        ended.write_text(json.dumps(kept), encoding="utf-8")
    names = component.__annotations__["return"]._fields if component else ()
    return namedtuple("Outputs", names)(**{key: result.values[key] for key in names}) if names else None


def main() -> None:
    """What Kubeflow's pods run: the SDK's executor, with the source that is the first argument as its module."""
    # Before the SDK is imported, which then leaves out all that a pod does not need.
    os.environ["_KFP_RUNTIME"] = "true"
    from kfp.dsl import executor_main

    source, *arguments = sys.argv[1:]
    # .../PIPELINE/RUN/TASK/EXECUTION/output_metadata.json
    outputs = json.loads(arguments[arguments.index("--executor_input") + 1])["outputs"]["outputFile"]
    os.environ.setdefault("MANYEYES_PIPELINE_RUN", Path(outputs).parts[-4])
    path = Path(tempfile.mkdtemp()) / "ephemeral_component.py"
    path.write_text(PRELUDE + source, encoding="utf-8")
    sys.argv[1:] = ["--component_module_path", str(path), *arguments]
    executor_main.executor_main()


def _refusing_too_large(step: Step) -> Step:
    """A pipeline's first step, which refuses a run that Kubeflow could not keep before it does anything else."""
    from manyeyes.kubeflow.sizes import SIZES, check_growth

    sizes = os.environ.get(SIZES)
    if sizes is None:
        return step

    @functools.wraps(step.function)
    def function(reporter: Reporter, **arguments: Any) -> StepResult:
        check_growth(sizes, arguments, what="this run")
        return step.function(reporter, **arguments)

    return replace(step, function=function)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return Path(value.path) if hasattr(value, "path") else value


if __name__ == "__main__":
    main()
