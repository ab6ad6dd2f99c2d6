"""``manyeyes ...``: the command line. Commands load what they need when they run, so that ``--help`` is instant."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import click

from manyeyes import __version__
from manyeyes.cli.chat import render_command
from manyeyes.cli.convert import convert_command, logits_command
from manyeyes.cli.data import (
    contamination_command,
    curate_command,
    diff_command,
    import_command,
    self_chat_command,
    sources_command,
)
from manyeyes.cli.evaluation import (
    compare_command,
    correlate_command,
    evaluate_command,
    judge_command,
    reliance_command,
    score_command,
)
from manyeyes.cli.generation import generate_group
from manyeyes.cli.group import CommandGroup as _Group
from manyeyes.cli.group import OutPath
from manyeyes.cli.pipeline import pipeline as pipeline_group
from manyeyes.cli.recipes import encoders_command, fusions_command, projectors_command
from manyeyes.cli.registry import (
    approve_command,
    ask_command,
    history_command,
    promote_command,
    pull_command,
    registry,
    reject_command,
    rollback_command,
    sign_command,
    verify_command,
)
from manyeyes.cli.serving import handoff_command, serve_command
from manyeyes.errors import (
    INTERRUPTED,
    NOT_PROMOTED,
    OTHER_ERROR,
    USER_ERROR,
    ManyEyesError,
    PipelineError,
    did_you_mean,
)
from manyeyes.terminal import replace_unknown_characters

# Which extra of this package brings which import.
EXTRAS = {
    "boto3": "data",
    "cyclonedx": "registry",
    "datasets": "dvc",
    "diffusers": "drawing",
    "fastapi": "serve",
    "great_expectations": "data",
    "huggingface_hub": "registry",
    "kfp": "pipeline",
    "kfp_server_api": "pipeline",
    "mlflow": "registry",
    "model_signing": "release",
    "onnx": "export",
    "onnxscript": "export",
    "pandas": "data",
    "prometheus_client": "serve",
    "pyarrow": "data",
    "safetensors": "train",
    "scipy": "data",
    "timm": "train",
    "torch": "train",
    "transformers": "train",
    "uvicorn": "serve",
}


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
@click.option("--data-remote", default="", help="A folder, s3:// or hub:OWNER/NAME@COMMIT; the checkout's default.")
@click.option("--registry-model", default="", help="Name in the registry; the recipe's own by default.")
@click.option("--param", "given", multiple=True, metavar="NAME=VALUE", help="Another parameter of the pipeline.")
@click.option("--require-promotion", is_flag=True, help="Exit with code 3 when the gate fails.")
@click.option("--no-cache", is_flag=True, help="Run every step again.")
def run(
    pipeline: str,
    recipe: str,
    assignments: tuple[str, ...],
    data_md5: str,
    data_remote: str,
    registry_model: str,
    given: tuple[str, ...],
    require_promotion: bool,
    no_cache: bool,
) -> None:
    """Run a compiled PIPELINE on this machine."""
    from rich.console import Console

    from manyeyes.kubeflow.run import ProgressView, RunOptions, find_pipeline, local_parameters, run_pipeline
    from manyeyes.kubeflow.summarise import in_words

    path = find_pipeline(pipeline, root=Path())
    if importlib.util.find_spec("kfp") is None:
        raise ModuleNotFoundError("no kfp", name="kfp")
    arguments = local_parameters(
        path,
        recipe=recipe,
        assignments=assignments,
        data_md5=data_md5,
        data_remote=data_remote,
        registry_model=registry_model,
        given=given,
    )
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


cli.add_command(pipeline_group)


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
@click.argument("out", type=OutPath())
@click.option("--from", "parquet", type=click.Path(path_type=Path), help="Benchmarks: Parquet instead of the hub.")
@click.option("--images-from", type=click.Path(path_type=Path), help="GQA: Parquet with the images, of --from.")
@click.option("--split", help="Benchmarks: another split than the one that is scored.")
def data_build(source: str, out: Path, parquet: Path | None, images_from: Path | None, split: str | None) -> None:
    """Build the data sets of SOURCE, for instance easy-vqa or a benchmark, into the folder OUT."""
    from manyeyes.data.builders import BUILDERS
    from manyeyes.evaluation.benchmarks import BENCHMARKS
    from manyeyes.evaluation.benchmarks.build import build_benchmark

    sources = [*BUILDERS, *(name for name, row in BENCHMARKS.items() if row.hub_id)]
    if source not in sources:
        raise PipelineError(
            f'source is "{source}"', f"one of {', '.join(sources)}", did_you_mean(source, sources) or "See --help."
        )
    if source in BUILDERS:
        BUILDERS[source](out)
    else:
        taken = build_benchmark(BENCHMARKS[source], out, parquet=parquet, images=images_from, split=split)
        click.echo(f"{source}: {taken}", err=True)
    click.echo(str(out))


@data.command("validate")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--suite", default="conversations", show_default=True)
@click.option("--dataset", "datasets", multiple=True, help="Data set to check; all but the evaluation sets by default.")
@click.option("--eval-dataset", "eval_datasets", multiple=True, help="Data set that the others must not contain.")
@click.option("--out", type=OutPath(), default=Path("runs/validation"), show_default=True)
def data_validate(
    folder: Path, suite: str, datasets: tuple[str, ...], eval_datasets: tuple[str, ...], out: Path
) -> None:
    """Check the snapshot in FOLDER; exit code 2 when the suite refuses it.

    What is found of a shard is kept, so that of the next snapshot only the shards that changed are read. Stopped with
    Ctrl-C, the same command goes on.
    """
    from manyeyes.data.snapshot import open_folder
    from manyeyes.data.validation import validate_snapshot
    from manyeyes.storage import cache_dir

    snapshot = open_folder(folder)
    entries = snapshot.manifest.datasets.items()
    records = [name for name, entry in entries if entry.layout == "records"]
    chosen = list(datasets) or [name for name in records if name not in eval_datasets]
    report = validate_snapshot(
        snapshot,
        datasets=chosen,
        eval_datasets=list(eval_datasets),
        suite=suite,
        out_dir=out,
        cache_dir=cache_dir() / "profiles",
        progress=lambda sentence, done: click.echo(f"{100 * done:3.0f}% {sentence}", err=True),
    )
    click.echo(f"{report.verdict}: {report.rows:,} samples, {report.quarantined} quarantined")
    for row in report.expectations:
        if not row.success:
            click.echo(f"  {row.severity}: {row.explanation}")
    click.echo(f"report: {out / 'validation.html'}")
    if report.verdict != "passed":
        sys.exit(USER_ERROR)


data.add_command(contamination_command)
data.add_command(import_command)
data.add_command(sources_command)
data.add_command(curate_command)
data.add_command(diff_command)
data.add_command(self_chat_command)
data.add_command(generate_group)


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
@click.option("--json", "as_json", is_flag=True, help="JSON, with the digest and what the recipe needs.")
def recipe_show(name: str, assignments: tuple[str, ...], as_json: bool) -> None:
    """The recipe NAME with every default filled in, and what it needs: parameters, tokens, memory, disk, FLOPs."""
    from manyeyes.cli.recipes import recipe_as_json, recipe_as_text
    from manyeyes.recipe import load_recipe, parse_overrides

    shown = load_recipe(name, overrides=parse_overrides(list(assignments)))
    click.echo(recipe_as_json(shown) if as_json else recipe_as_text(shown))


cli.add_command(encoders_command)
cli.add_command(fusions_command)
cli.add_command(projectors_command)


@cli.group(cls=_Group)
def chat() -> None:
    """Conversations as text and tokens."""


chat.add_command(render_command)


# --- models --------------------------------------------------------------------------------------------------------


cli.add_command(evaluate_command)
cli.add_command(score_command)
cli.add_command(judge_command)
cli.add_command(compare_command)
cli.add_command(correlate_command)
cli.add_command(reliance_command)
cli.add_command(ask_command)
cli.add_command(serve_command)
cli.add_command(handoff_command)


for command in (
    *(pull_command, sign_command, verify_command, promote_command, rollback_command),
    *(approve_command, reject_command, history_command, registry),
):
    cli.add_command(command)
cli.add_command(convert_command)
cli.add_command(logits_command)


def main() -> None:
    """Entry point: runs a command and turns errors into exit codes."""
    replace_unknown_characters()
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
