"""``manyeyes step NAME``: one step from files, outside of any pipeline."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from manyeyes.cli.group import OutPath
from manyeyes.harness.base import LocalArtifact, Step, StepResult, run_step
from manyeyes.harness.events import watching
from manyeyes.harness.inputs import Pinned, locate_data
from manyeyes.harness.kept import code_digest
from manyeyes.recipe import Recipe, load_recipe, parse_overrides
from manyeyes.sources import pin_recipe

STEP_NAMES = (
    "preflight",
    "resolve_data",
    "validate_data",
    "prealign_encoder",
    "pretrain_projector",
    "sft",
    "evaluate",
    "export_onnx",
    "gate",
    "register",
    "pretrain_language_model",
    "pretrain_encoder",
)

# What preflight works out for the other steps; here the command line does.
_DATA = {
    "data_md5": "Snapshot; the checkout's data.dvc says it by default.",
    "data_remote": "A folder, s3:// or hub:OWNER/NAME@COMMIT; the checkout's default remote by default.",
}


def load_step(name: str, arguments: Mapping[str, Any]) -> Step:
    """The step ``name``; ``evaluate`` has one for each kind of model."""
    module = importlib.import_module(f"manyeyes.steps.{name}")
    found: Step = module.STEPS[arguments.get("kind", "torch")] if name == "evaluate" else module.STEP
    return found


def step_command(name: str) -> click.Command:
    """A command with one option for each argument of the step function that a person has to give."""
    step = load_step(name, {})
    signature = inspect.signature(step.function)
    types = typing.get_type_hints(step.function)
    described = _described_arguments(inspect.getdoc(step.function) or "")
    options: list[click.Parameter] = []
    for argument in list(signature.parameters.values())[1:]:
        if argument.name == "pinned" or argument.name in step.outputs:
            continue
        many = typing.get_origin(types[argument.name]) is Sequence
        required = argument.default is inspect.Parameter.empty
        default = None if argument.default is inspect.Parameter.empty else argument.default
        options.append(
            click.Option(
                [f"--{argument.name.replace('_', '-')}"],
                type=_click_type(types[argument.name]),
                required=required and not many,
                default=default,
                multiple=many,
                help=_DATA.get(argument.name) or described.get(argument.name, ""),
            )
        )
    if "pinned" in signature.parameters:
        options += [
            click.Option([f"--{name.replace('_', '-')}"], default="", help=text) for name, text in _DATA.items()
        ]
        options.append(click.Option(["--recipe"], default="tiny", help="A recipe's name or the path of a YAML file."))
        options.append(click.Option(["--set", "assignments"], multiple=True, metavar="A.B=C", help="Change a field."))
    options.append(click.Option(["--out"], type=OutPath(), default=Path("runs/steps") / name, help="Folder to write."))

    def call(out: Path, recipe: str = "tiny", assignments: tuple[str, ...] = (), **given: Any) -> None:
        if "pinned" not in signature.parameters and "recipe" in signature.parameters:
            given["recipe"] = recipe
        run_from_files(
            name,
            {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()},
            recipe=recipe,
            assignments=assignments,
            data_md5=given.get("data_md5") or "",
            data_remote=given.get("data_remote") or "",
            out=out,
        )

    summary = (inspect.getdoc(step.function) or name).partition("\n\n")[0]
    return click.Command(name, callback=call, params=options, help=summary)


def run_from_files(
    name: str,
    arguments: Mapping[str, Any],
    *,
    recipe: str | Recipe,
    assignments: Sequence[str] = (),
    data_md5: str,
    data_remote: str,
    out: Path,
) -> StepResult:
    """Run one step and show how far it is; its outputs and reports go to ``out``.

    Args:
        name: Of ``STEP_NAMES``.
        arguments: The step function's own arguments.
        recipe: Name or path, or what was made from one.
        assignments: Overrides, ``a.b=c``, of a name or path.
        data_md5: Snapshot; the checkout's own when empty.
        data_remote: Where it is; the checkout's own when empty.
        out: Folder to write.
    """
    step = load_step(name, arguments)
    wanted = inspect.signature(step.function).parameters
    given = dict(arguments)
    if "pinned" in wanted:
        loaded = recipe
        if not isinstance(loaded, Recipe):
            loaded = load_recipe(loaded, overrides=parse_overrides(list(assignments)))
        loaded = pin_recipe(loaded)
        where = locate_data(data_md5, data_remote)
        given = {name: value for name, value in given.items() if name in wanted}
        pinned = Pinned(loaded, *where, code_digest())
        given["pinned"] = pinned.of(name, encoder=str(given.get("encoder") or "")).text()
        if "registry_model" in wanted:
            given["registry_model"] = given.get("registry_model") or loaded.registry.model
    out.mkdir(parents=True, exist_ok=True)
    with _showing_progress():
        result = run_step(
            step,
            metrics=LocalArtifact(str(out / "metrics.json")),
            report=LocalArtifact(str(out / "report.html")),
            notes=LocalArtifact(str(out / "report.md")),
            outputs={key: LocalArtifact(str(out / key)) for key in step.outputs},
            **given,
        )
    click.echo(f"{name}: {result.headline}")
    click.echo(f"report: {out / 'report.html'}")
    return result


@contextmanager
def _showing_progress() -> Iterator[None]:
    """One line on a terminal's standard error, or one line now and then in a log."""
    from rich.console import Console

    from manyeyes.kubeflow.run import ProgressView

    view = ProgressView(Console(stderr=True))
    view.begin()
    try:
        with watching(lambda event: view.update([event])):
            yield
    finally:
        view.interrupt()
        view.end()


def _click_type(annotation: Any) -> click.ParamType:
    inner = [part for part in typing.get_args(annotation) if part is not type(None)]
    if annotation is Path or Path in inner:
        return click.Path(path_type=Path, exists=True)
    if typing.get_origin(annotation) is typing.Literal:
        return click.Choice([str(choice) for choice in inner])
    return click.INT if int in (annotation, *inner) else click.STRING


def _described_arguments(docstring: str) -> dict[str, str]:
    """Argument descriptions of a Google docstring."""
    described: dict[str, str] = {}
    _, _, tail = docstring.partition("Args:\n")
    for line in tail.splitlines():
        name, colon, text = line.strip().partition(": ")
        if not line.strip():
            break
        if colon and name.isidentifier():
            described[name] = text
    return described
