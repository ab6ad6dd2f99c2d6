"""What every component calls: from the arguments that kfp gives it to the step, and back to kfp's output parameters.

A component's source travels in its pipeline, six copies of it a task (``sizes.py``), so all of it that can stand here
does.
"""

from __future__ import annotations

import importlib
import inspect
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyeyes.harness.base import Step, run_step

_SHOWN = ("report", "metrics", "notes")


def run_component(name: str, arguments: Mapping[str, Any], *, label: str = "", kind: str = "") -> Any:
    """Run a step with a component's arguments.

    Args:
        name: The step's name.
        arguments: The component's own arguments, by name: plain values, and artifacts, which have a path. The step
            function gets the values and the paths under the same names.
        label: Tells apart two tasks of one step.
        kind: Which of the module's ``STEPS`` is run; its only ``STEP`` when empty.

    Returns:
        The step's output parameters, by name.
    """
    module = importlib.import_module(f"manyeyes.steps.{name}")
    step: Step = module.STEPS[kind] if kind else module.STEP
    taken = inspect.signature(step.function).parameters
    # kfp gives None for an optional artifact that nobody passed: the function's own default counts.
    given = {key: _plain(arguments[key]) for key in taken if key not in step.outputs and arguments.get(key) is not None}
    result = run_step(
        step,
        **{key: arguments[key] for key in _SHOWN if key in arguments},
        label=label,
        outputs={key: arguments[key] for key in step.outputs},
        **given,
    )
    return namedtuple("Outputs", result.values)(**result.values)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return Path(value.path) if hasattr(value, "path") else value
