"""``manyeyes ...``: the command line. Commands load what they need when they run, so that ``--help`` is instant."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import click

from manyeyes import __version__
from manyeyes.cli.chat import render_command
from manyeyes.errors import ManyEyesError, PipelineError, did_you_mean

USER_ERROR = 2
OTHER_ERROR = 1
NOT_PROMOTED = 3
INTERRUPTED = 130


# Which extra of this package brings which import.
EXTRAS = {
    "boto3": "data",
    "great_expectations": "data",
    "kfp": "pipeline",
    "mlflow": "registry",
    "onnx": "export",
    "onnxscript": "export",
    "pandas": "data",
    "pyarrow": "data",
    "safetensors": "train",
    "timm": "train",
    "torch": "train",
    "transformers": "train",
}


class _Group(click.Group):
    """Offers the nearest spelling of an unknown command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None:
            hint = did_you_mean(args[0], self.list_commands(ctx))
            raise click.UsageError(f'no command "{args[0]}". {hint}See: {ctx.command_path} --help', ctx)
        return super().resolve_command(ctx, args)


def _show_error(error: ManyEyesError) -> None:
    click.echo(f"{type(error).__name__}", err=True)
    for name in ("found", "needed", "do"):
        text = getattr(error, name)
        if text:
            click.echo(f"  {name:<7} {text}", err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="manyeyes")
def cli() -> None:
    """Multimodal language models with several vision encoders, from versioned data to a promoted ONNX bundle."""


# --- run -----------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("pipeline", default="train")
@click.option("--recipe", default="tiny", show_default=True, help="A recipe's name or the path of a YAML file.")
@click.option("--set", "assignments", multiple=True, metavar="A.B=C", help="Change a field of the recipe.")
@click.option("--data-md5", default="", help="Snapshot; the checkout's data.dvc says it by default.")
@click.option("--data-remote", default="", help="A folder or s3://; the checkout's default remote by default.")
@click.option("--registry-model", default="", help="Name in the registry; the recipe's own by default.")
@click.option("--require-promotion", is_flag=True, help="Exit with code 3 when the gate fails.")
@click.option("--no-cache", is_flag=True, help="Run every step again.")
def run(
    pipeline: str,
    recipe: str,
    assignments: tuple[str, ...],
    data_md5: str,
    data_remote: str,
    registry_model: str,
    require_promotion: bool,
    no_cache: bool,
) -> None:
    """Run a compiled PIPELINE on this machine."""
    from rich.console import Console

    from manyeyes.cli.progress import ProgressView
    from manyeyes.cli.run import RunOptions, find_pipeline, run_pipeline
    from manyeyes.cli.summarise import in_words
    from manyeyes.recipe import load_recipe, parse_overrides
    from manyeyes.steps.inputs import locate_data

    path = find_pipeline(pipeline, root=Path())
    if importlib.util.find_spec("kfp") is None:
        raise ModuleNotFoundError("no kfp", name="kfp")
    # Wrong input is refused here at once; resolve_data checks it again, for those who start a pipeline elsewhere.
    checked = load_recipe(recipe, overrides=parse_overrides(list(assignments)))
    md5, remote = locate_data(data_md5, data_remote)
    is_file = recipe.endswith((".yaml", ".yml"))
    arguments = {
        "recipe": checked.canonical_json() if is_file else recipe,
        "recipe_overrides": "" if is_file else "\n".join(assignments),
        "data_md5": md5,
        "data_remote": remote,
        "registry_model": registry_model,
    }
    options = RunOptions(path, path.stem, arguments, use_cache=not no_cache)
    summary = run_pipeline(options, view=ProgressView(Console(stderr=False)))
    click.echo()
    for line in in_words(summary):
        click.echo(line)
    if summary.status == "interrupted":
        sys.exit(INTERRUPTED)
    if summary.error is not None:
        sys.exit(USER_ERROR if summary.error.user_error else OTHER_ERROR)
    promoted = summary.model is not None and "champion" in summary.model.aliases
    if require_promotion and not promoted:
        click.echo("not promoted, and --require-promotion was given", err=True)
        sys.exit(NOT_PROMOTED)


# --- pipeline ------------------------------------------------------------------------------------------------------


@cli.group(cls=_Group)
def pipeline() -> None:
    """Compile pipelines."""


@pipeline.command("compile")
@click.argument("names", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), default=Path("pipelines/compiled"), show_default=True)
def pipeline_compile(names: tuple[str, ...], out: Path) -> None:
    """Write pipelines/compiled/NAME.yaml; all pipelines by default."""
    from manyeyes.cli.pipeline import PIPELINES, compile_pipeline

    for name in names or PIPELINES:
        click.echo(str(compile_pipeline(name, out / f"{name}.yaml")))


# --- step ----------------------------------------------------------------------------------------------------------


class _StepGroup(_Group):
    """One command a step; its options are the step function's arguments."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        from manyeyes.cli.step import STEP_NAMES

        return list(STEP_NAMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        from manyeyes.cli.step import STEP_NAMES, step_command

        return step_command(cmd_name) if cmd_name in STEP_NAMES else None


@cli.group(cls=_StepGroup)
def step() -> None:
    """Run one step from files."""


# --- data ----------------------------------------------------------------------------------------------------------


@cli.group(cls=_Group)
def data() -> None:
    """Build and check snapshots."""


@data.command("build")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
def data_build(source: str, out: Path) -> None:
    """Build the data sets of SOURCE into the folder OUT."""
    from manyeyes.data.builders import BUILDERS

    if source not in BUILDERS:
        raise PipelineError(
            f'source is "{source}"', f"one of {', '.join(BUILDERS)}", did_you_mean(source, BUILDERS) or "See --help."
        )
    BUILDERS[source](out)
    click.echo(str(out))


@data.command("validate")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--suite", default="conversations", show_default=True)
@click.option("--dataset", "datasets", multiple=True, help="Data set to check; all but the evaluation sets by default.")
@click.option("--eval-dataset", "eval_datasets", multiple=True, help="Data set that the others must not contain.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/validation"), show_default=True)
def data_validate(
    folder: Path, suite: str, datasets: tuple[str, ...], eval_datasets: tuple[str, ...], out: Path
) -> None:
    """Check the snapshot in FOLDER; exit code 2 when the suite refuses it."""
    from manyeyes.data.snapshot import open_folder
    from manyeyes.data.validation import validate_snapshot

    snapshot = open_folder(folder)
    chosen = list(datasets) or [name for name in snapshot.manifest.datasets if name not in eval_datasets]
    report = validate_snapshot(snapshot, datasets=chosen, eval_datasets=list(eval_datasets), suite=suite, out_dir=out)
    click.echo(f"{report.verdict}: {report.rows:,} samples, {report.quarantined} quarantined")
    for row in report.expectations:
        if not row.success:
            click.echo(f"  {row.severity}: {row.explanation}")
    click.echo(f"report: {out / 'validation.html'}")
    if report.verdict != "passed":
        sys.exit(USER_ERROR)


# --- what there is -------------------------------------------------------------------------------------------------


@cli.group(cls=_Group)
def recipe() -> None:
    """List and show recipes."""


@recipe.command("list")
def recipe_list() -> None:
    """Names and descriptions."""
    from manyeyes.recipe import list_recipes, load_recipe

    for name in list_recipes():
        click.echo(f"{name:<24} {load_recipe(name).description}")


@recipe.command("show")
@click.argument("name")
@click.option("--set", "assignments", multiple=True, metavar="A.B=C", help="Change a field.")
@click.option("--json", "as_json", is_flag=True, help="JSON, with the digest.")
def recipe_show(name: str, assignments: tuple[str, ...], as_json: bool) -> None:
    """The recipe NAME with every default filled in."""
    import yaml

    from manyeyes.recipe import load_recipe, parse_overrides

    shown = load_recipe(name, overrides=parse_overrides(list(assignments)))
    if as_json:
        click.echo(json.dumps({"digest": shown.digest, "recipe": shown.model_dump(mode="json")}, indent=2))
    else:
        click.echo(yaml.safe_dump(shown.model_dump(mode="json"), sort_keys=False, width=120), nl=False)
        click.echo(f"# digest {shown.digest}")


@cli.command()
def encoders() -> None:
    """The vision encoders that a recipe may name."""
    from manyeyes.encoders import ENCODERS

    for name, row in ENCODERS.items():
        click.echo(
            f"{name:<24} {row.family:<14} {row.image_size:>4} px, stride {row.stride}, {row.channels} channels; "
            f"{row.pretraining}; {row.licence}"
        )


@cli.command()
def fusions() -> None:
    """The ways to join encoders that a recipe may name."""
    from manyeyes.fusion import FUSIONS

    for name, row in FUSIONS.items():
        click.echo(f"{name:<24} {row.description}")


@cli.group(cls=_Group)
def chat() -> None:
    """Conversations as text and tokens."""


chat.add_command(render_command)


# --- models --------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--recipe", default="tiny", show_default=True)
@click.option("--set", "assignments", multiple=True, metavar="A.B=C", help="Change a field of the recipe.")
@click.option("--data-md5", default="")
@click.option("--data-remote", default="")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/evaluation"), show_default=True)
def evaluate(
    model: Path, recipe: str, assignments: tuple[str, ...], data_md5: str, data_remote: str, out: Path
) -> None:
    """Score the checkpoint or bundle in the folder MODEL on a recipe's benchmarks."""
    from manyeyes.cli.step import run_from_files

    kind = "bundle" if (model / "manifest.json").is_file() else "torch"
    run_from_files(
        "evaluate",
        {"kind": kind, "model": model},
        recipe=recipe,
        assignments=assignments,
        data_md5=data_md5,
        data_remote=data_remote,
        out=out,
    )


@cli.command()
@click.argument("model")
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("question")
@click.option("--max-new-tokens", default=32, show_default=True)
def ask(model: str, image: Path, question: str, max_new_tokens: int) -> None:
    """Ask MODEL[@ALIAS or /VERSION], or the bundle in the folder MODEL, QUESTION about IMAGE."""
    from manyeyes.runtime.bundle import load_bundle

    if not image.is_file():
        raise PipelineError(f'image is "{image}"', "an image file", "Check the path.")
    if (Path(model) / "manifest.json").is_file():
        click.echo(
            load_bundle(Path(model)).answer(question, images=[image.read_bytes()], max_new_tokens=max_new_tokens)
        )
        return
    from manyeyes.cli.models import pulled_bundle

    bundle = load_bundle(pulled_bundle(model))
    click.echo(bundle.answer(question, images=[image.read_bytes()], max_new_tokens=max_new_tokens))


@cli.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
def pull(model: str, out: Path) -> None:
    """Fetch the bundle of MODEL[@ALIAS or /VERSION] into the folder OUT; MODEL alone means its champion."""
    from manyeyes.cli.models import pull_model

    click.echo(str(pull_model(model, out)))


@cli.command()
@click.argument("model")
@click.option("--force", is_flag=True, help="Promote a version that the gate failed, too.")
def promote(model: str, force: bool) -> None:
    """Make MODEL/VERSION the champion."""
    from manyeyes.cli.models import promote_model

    click.echo(promote_model(model, force=force))


@cli.command()
@click.argument("model")
def rollback(model: str) -> None:
    """Make MODEL's previous version the champion again."""
    from manyeyes.cli.models import rollback_model

    click.echo(rollback_model(model))


def main() -> None:
    """Entry point: runs a command and turns errors into exit codes."""
    try:
        cli(standalone_mode=False)
    except ManyEyesError as error:
        _show_error(error)
        sys.exit(USER_ERROR)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _show_error(
            PipelineError(
                f'package "{error.name}" is not installed',
                f'the extra "{extra}" of manyeyes',
                f"Install it: pip install 'manyeyes[{extra}]', or in a checkout: make setup",
            )
        )
        sys.exit(USER_ERROR)
    except click.ClickException as error:
        error.show()
        sys.exit(USER_ERROR)
    except click.Abort:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
