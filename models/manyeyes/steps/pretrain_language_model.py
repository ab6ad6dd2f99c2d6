"""Makes the small language model that the smallest recipe starts from; not part of a pipeline."""

from __future__ import annotations

from pathlib import Path

from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import open_data


def pretrain_language_model(
    reporter: Reporter,
    *,
    pretrained: Path,
    data_folder: str = "",
    data_md5: str = "",
    data_remote: str = "",
    seed: int = 1,
) -> StepResult:
    """Train a small language model and its tokenizer on the training set's text and on documentation.

    Args:
        reporter: Shows the progress.
        pretrained: Folder to write.
        data_folder: A snapshot's folder that DVC does not track yet; wins over the next two.
        data_md5: Snapshot; the checkout's own when empty.
        data_remote: Where it is; the checkout's own when empty.
        seed: Of weights and order.
    """
    from manyeyes.training.warmup import pretrain_language_model as train

    snapshot = open_data(data_folder, data_md5=data_md5, data_remote=data_remote)
    reporter.progress("training", done=0.0)
    loss = train(pretrained, snapshot=snapshot, seed=seed)
    return StepResult(f"loss {loss:.3f} at the answers", metrics={"loss": loss}, metadata={"data_md5": snapshot.md5})


STEP = Step(
    "pretrain_language_model",
    pretrain_language_model,
    imports=("torch", "manyeyes.training.warmup"),
    outputs=("pretrained",),
    tracked=False,
)
