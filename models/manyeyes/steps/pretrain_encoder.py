"""Pretrains an encoder on masked patches of the training images; not part of a pipeline."""

from __future__ import annotations

from pathlib import Path

from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import open_data


def pretrain_encoder(
    reporter: Reporter,
    *,
    pretrained: Path,
    encoder: str = "vit-tiny-p16-64",
    data_folder: str = "",
    data_md5: str = "",
    data_remote: str = "",
    seed: int = 1,
) -> StepResult:
    """Train an encoder to fill in masked patches.

    Args:
        reporter: Shows the progress.
        pretrained: Folder to write.
        encoder: Row of ENCODERS.
        data_folder: A snapshot's folder that DVC does not track yet; wins over the next two.
        data_md5: Snapshot; the checkout's own when empty.
        data_remote: Where it is; the checkout's own when empty.
        seed: Of weights, order and masks.
    """
    from manyeyes.training.warmup import pretrain_encoder as train

    snapshot = open_data(data_folder, data_md5=data_md5, data_remote=data_remote)
    reporter.progress("training", done=0.0)
    error = train(pretrained, snapshot=snapshot, encoder=encoder, seed=seed)
    return StepResult(
        f"mean squared error {error:.3f} at the masked patches",
        metrics={"masked_error": error},
        metadata={"data_md5": snapshot.md5, "encoder": encoder},
    )


STEP = Step(
    "pretrain_encoder",
    pretrain_encoder,
    imports=("torch", "manyeyes.training.warmup"),
    outputs=("pretrained",),
    tracked=False,
)
