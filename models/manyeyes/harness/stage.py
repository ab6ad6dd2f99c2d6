"""What the three training steps share: calling the stage, showing its progress, drawing its curve."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyeyes.data.quarantine import read_quarantine
from manyeyes.errors import PipelineError
from manyeyes.harness.base import Reporter, StepResult, num_threads
from manyeyes.harness.inputs import parse_pinned, work_dir
from manyeyes.harness.trainjob import train_in_trainjob, uses_trainjob
from manyeyes.pages import Curve, draw_curves, facts_table, step_page
from manyeyes.recipe import StageName

# kfp.local runs at most two iterations of a loop at a time (kfp/local/orchestrator/enhanced_dag_orchestrator.py).
LOCAL_BRANCHES = 2

# One core decodes and resizes 60 to 250 images a second; a GPU trains on 80 of them at most.
DATA_WORKERS = 4

HEAVY = ("torch", "manyeyes.model", "manyeyes.training.launch", "manyeyes.registry.tracking")


def train_stage(
    reporter: Reporter,
    stage: StageName,
    *,
    pinned: str,
    validation: Path,
    out: Path,
    encoder: str | None = None,
    encoder_checkpoints: Mapping[str, Path] | None = None,
    checkpoint: Path | None = None,
    branches: int | None = None,
) -> StepResult:
    """Run one stage of the recipe; arguments as for ``manyeyes.training.stage.run_stage``.

    ``branches`` says how many such steps run side by side on this machine; ``preflight`` said it when left out.
    """
    import torch

    from manyeyes.training.launch import launch_stage
    from manyeyes.training.loop import Progress
    from manyeyes.training.running import TokenCounts
    from manyeyes.training.stage import ADAPTER

    inputs = parse_pinned(pinned)
    threads = num_threads(branches=branches or parallel_branches(stage))
    processes = num_processes(threads=threads, gpus=torch.cuda.device_count())

    def show(progress: Progress) -> None:
        reporter.progress(
            f"step {progress.step:,} of {progress.steps:,}, loss {progress.loss:.3f}, "
            f"{progress.samples_per_s:,.0f} samples/s, {progress.tokens_per_s:,.0f} tokens/s "
            f"({progress.padding:.0%} padding beside them, {progress.supervised:.0%} supervised), "
            f"waits for data {progress.data_wait:.0%} of the time, for checkpoints {progress.checkpoint_stall:.1%}, "
            f"{progress.mfu:.0%} of the peak, {progress.peak_memory_gb:.1f} GB"
            + (f"; {progress.slow}" if progress.slow else ""),
            done=progress.step / progress.steps,
            eta_s=progress.eta_s,
            optimizer_step=progress.step,
            curves={
                "loss": progress.loss,
                "learning_rate": progress.learning_rate,
                "samples_per_s": progress.samples_per_s,
                "data_wait": progress.data_wait,
                "checkpoint_stall": progress.checkpoint_stall,
                "tokens_per_s": progress.tokens_per_s,
                "padding": progress.padding,
                "supervised": progress.supervised,
                "mfu": progress.mfu,
                "peak_memory_gb": progress.peak_memory_gb,
            },
        )

    what: dict[str, Any] = {
        "out": out,
        "encoder": encoder,
        "encoder_checkpoints": dict(encoder_checkpoints or {}),
        "checkpoint": checkpoint,
        "quarantine": read_quarantine(validation),
        "on_progress": show,
    }
    if uses_trainjob():
        report = train_in_trainjob(stage, pinned=pinned, on_wait=reporter.progress, **what)
    else:
        report = launch_stage(
            inputs.recipe,
            stage,
            processes=processes,
            threads=max(1, threads // processes),
            snapshot=inputs.snapshot,
            code_digest=inputs.code_digest,
            work_dir=work_dir(),
            data_workers=num_data_workers(threads=max(1, threads // processes), gpus=torch.cuda.device_count()),
            **what,
        )
    speed = report.samples / report.seconds if report.seconds else 0.0
    waited_s = report.data_wait_s or 0.0
    data_wait = waited_s / report.seconds if report.seconds else 0.0
    stalled_s = report.checkpoint_stall_s or 0.0
    checkpoint_stall = stalled_s / report.seconds if report.seconds else 0.0
    tokens = report.tokens or TokenCounts()
    tokens_per_s = tokens.real / report.seconds if report.seconds else 0.0
    rows: list[tuple[str, object]] = [
        ("optimizer steps", report.steps),
        ("samples", report.samples),
        ("loss at the start", report.first_loss),
        ("loss at the end", report.final_loss),
        ("seconds of training", report.seconds),
        ("samples a second", speed),
        ("tokens a second", f"{tokens_per_s:,.0f} ({tokens.supervised_share:.1%} of them supervised)"),
        ("model FLOPs utilisation", f"{report.mfu or 0.0:.1%} of what the devices can compute"),
        ("memory at its highest", f"{report.peak_memory_gb or 0.0:,.2f} GB in a process"),
        ("padding", f"{tokens.padding:.1%} of what the language model computed"),
        ("seconds of waiting for data", f"{waited_s:,.1f} ({data_wait:.1%} of the training)"),
        ("seconds of waiting for running checkpoints", f"{stalled_s:,.1f} ({checkpoint_stall:.1%} of the training)"),
        *(
            (
                f"features of {own.encoder}",
                f"{'kept' if own.kept else 'made each time'}, {own.made:,} made and {own.read:,} read; {own.why}",
            )
            for own in report.features or ()
        ),
        ("continued from step", "never stopped" if report.resumed_from_step is None else report.resumed_from_step),
        *((f"trainable parameters of {group}", count) for group, count in report.trainable_parameters.items()),
        *(("on the way", note) for note in report.notes),
        ("checkpoint digest", report.checkpoint_digest),
        *([("adapters alone, for peft", f"{ADAPTER}/ in the checkpoint")] if report.adapter_sha256 else []),
    ]
    loss = Curve("loss", [(point.step, point.loss) for point in report.history])
    rate = Curve("learning rate", [(point.step, point.learning_rate) for point in report.history], "off")
    use = Curve("MFU", [(point.step, point.mfu or 0.0) for point in report.history])
    wait = Curve("waiting for data", [(point.step, point.data_wait or 0.0) for point in report.history], "off")
    name = f"{stage} of {encoder}" if encoder else stage
    return StepResult(
        headline=f"loss {report.first_loss:.3f} to {report.final_loss:.3f}, {speed:,.0f} samples/s",
        metrics={
            "first_loss": report.first_loss,
            "final_loss": report.final_loss,
            "samples_per_s": speed,
            "optimizer_steps": float(report.steps),
            "train_seconds": report.seconds,
            "data_wait": data_wait,
            "checkpoint_stall": checkpoint_stall,
            "tokens_per_s": tokens_per_s,
            "padding": tokens.padding,
            "supervised": tokens.supervised_share,
            "mfu": report.mfu or 0.0,
            "peak_memory_gb": report.peak_memory_gb or 0.0,
        },
        html=step_page(
            f"Stage {name}",
            "How the loss fell, and what was trained.",
            {
                "Loss": draw_curves([loss], x_label="optimizer step", y_label="loss per supervised token"),
                "Learning rate": draw_curves([rate], x_label="optimizer step", y_label="learning rate"),
                "Use of the devices": draw_curves([use], x_label="optimizer step", y_label="share of their peak"),
                "Waiting for data": draw_curves([wait], x_label="optimizer step", y_label="share of the time"),
                "Figures": facts_table(rows),
            },
        ),
        markdown=facts_table(rows).markdown() + "\n",
        metadata={
            "checkpoint_digest": report.checkpoint_digest,
            "recipe_digest": inputs.recipe.digest,
            "data_md5": inputs.data_md5,
            "code_digest": inputs.code_digest,
        },
    )


def num_processes(*, threads: int, gpus: int) -> int:
    """Processes that train a stage: ``MANYEYES_PROCESSES``, else one a GPU, else two where a step has two threads.

    Args:
        threads: Threads that the step may use.
        gpus: GPUs that the step may use.
    """
    given = os.environ.get("MANYEYES_PROCESSES")
    return int(given) if given else max(1, gpus) if gpus else min(2, threads)


def num_data_workers(*, threads: int, gpus: int) -> int:
    """Processes that build batches ahead of each training process: ``MANYEYES_DATA_WORKERS``, else up to 4 on a GPU.

    On a CPU there are none: they would take the cores that train, and what comes again would be decoded anew by each.

    Args:
        threads: Threads that the training process may use.
        gpus: GPUs that the step may use.

    Raises:
        PipelineError: The variable is no such number.
    """
    given = os.environ.get("MANYEYES_DATA_WORKERS", "")
    if given and not given.isdecimal():
        raise PipelineError(
            f'MANYEYES_DATA_WORKERS is "{given}"', "a whole number of at least 0", "Correct or unset it."
        )
    return int(given) if given else max(1, min(DATA_WORKERS, threads - 1)) if gpus else 0


def note_branches(encoders: int) -> None:
    """Leave in the run's folder how many encoders are prealigned: a step of one of them is not told of the others."""
    if "MANYEYES_RUN_DIR" in os.environ:
        _branches_file().write_text(str(encoders), encoding="utf-8")


def parallel_branches(stage: StageName) -> int:
    """How many steps of a stage this machine runs side by side; on a cluster each has its own pod."""
    if stage != "prealign" or "MANYEYES_RUN_DIR" not in os.environ or not _branches_file().is_file():
        return 1
    return max(1, min(int(_branches_file().read_text(encoding="utf-8")), LOCAL_BRANCHES))


def _branches_file() -> Path:
    return Path(os.environ["MANYEYES_RUN_DIR"]) / "prealigned-encoders"
