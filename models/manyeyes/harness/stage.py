"""What the three training steps share: calling the stage, showing its progress, drawing its curve."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from manyeyes.data.quarantine import read_quarantine
from manyeyes.harness.base import Reporter, StepResult, num_threads
from manyeyes.harness.inputs import parse_pinned, work_dir
from manyeyes.pages import Curve, draw_curves, facts_table, step_page
from manyeyes.recipe import StageName

# kfp.local runs at most two iterations of a loop at a time (kfp/local/orchestrator/enhanced_dag_orchestrator.py).
LOCAL_BRANCHES = 2

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

    ``branches`` says how many such steps run side by side on this machine; ``resolve_data`` said it when left out.
    """
    import torch

    from manyeyes.training.launch import launch_stage
    from manyeyes.training.loop import Progress

    inputs = parse_pinned(pinned)
    threads = num_threads(branches=branches or parallel_branches(stage))
    processes = num_processes(threads=threads, gpus=torch.cuda.device_count())

    def show(progress: Progress) -> None:
        reporter.progress(
            f"step {progress.step:,} of {progress.steps:,}, loss {progress.loss:.3f}, "
            f"{progress.samples_per_s:,.0f} samples/s",
            done=progress.step / progress.steps,
            eta_s=progress.eta_s,
            optimizer_step=progress.step,
            curves={
                "loss": progress.loss,
                "learning_rate": progress.learning_rate,
                "samples_per_s": progress.samples_per_s,
            },
        )

    report = launch_stage(
        inputs.recipe,
        stage,
        processes=processes,
        threads=max(1, threads // processes),
        snapshot=inputs.snapshot,
        code_digest=inputs.code_digest,
        out=out,
        work_dir=work_dir(),
        encoder=encoder,
        encoder_checkpoints=dict(encoder_checkpoints or {}),
        checkpoint=checkpoint,
        quarantine=read_quarantine(validation),
        on_progress=show,
    )
    speed = report.samples / report.seconds if report.seconds else 0.0
    rows: list[tuple[str, object]] = [
        ("optimizer steps", report.steps),
        ("samples", report.samples),
        ("loss at the start", report.first_loss),
        ("loss at the end", report.final_loss),
        ("seconds of training", report.seconds),
        ("samples a second", speed),
        ("continued from step", "never stopped" if report.resumed_from_step is None else report.resumed_from_step),
        *((f"trainable parameters of {group}", count) for group, count in report.trainable_parameters.items()),
        ("checkpoint digest", report.checkpoint_digest),
    ]
    loss = Curve("loss", [(point.step, point.loss) for point in report.history])
    rate = Curve("learning rate", [(point.step, point.learning_rate) for point in report.history], "off")
    name = f"{stage} of {encoder}" if encoder else stage
    return StepResult(
        headline=f"loss {report.first_loss:.3f} to {report.final_loss:.3f}, {speed:,.0f} samples/s",
        metrics={
            "first_loss": report.first_loss,
            "final_loss": report.final_loss,
            "samples_per_s": speed,
            "optimizer_steps": float(report.steps),
            "train_seconds": report.seconds,
        },
        html=step_page(
            f"Stage {name}",
            "How the loss fell, and what was trained.",
            {
                "Loss": draw_curves([loss], x_label="optimizer step", y_label="loss per supervised token"),
                "Learning rate": draw_curves([rate], x_label="optimizer step", y_label="learning rate"),
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
