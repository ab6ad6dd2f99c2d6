"""``python -m bench.sft``: fine-tuning on unlike lengths beside TRL's ``SFTTrainer``, which packs nothing with images.

The small LLaVA of ``bench.training``: projector and language model train, the encoder is frozen. Samples have 196
visual tokens (one in seventeen has no image) and text with a long tail of lengths, as LLaVA-665k has. TRL trains on
padded micro-batches of four records in their order, without recomputing; ours packs the same step into rows of so many
tokens. TRL gets tokens and pixels ready made, so its processor costs nothing here.

TRL is installed beside this Python, into ``runs/bench/trl``; where that cannot be had, the bench says so and ends.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoProcessor, Trainer

from bench import RESULTS, write_result
from bench.peers_install import make_python
from bench.peers_model import write_peer_model
from bench.training import (
    IMAGE_TOKEN,
    SIZES,
    Ours,
    Peer,
    Rows,
    common_arguments,
    compare,
    in_order,
)
from manyeyes.converters.convert import convert
from manyeyes.recipe import PackingSpec
from manyeyes.runtime.chat import Encoded
from manyeyes.training.batches import Batch
from manyeyes.training.packing import SampleSize, pack_row, share_out

ROOT = Path(__file__).resolve().parents[1]
TRL = "trl==1.16.0"
GROUPS = ("projector", "language_model")
STEP, MICRO_BATCH, TOKENS, LONGEST = 4, 4, 2048, 768
VISUAL = (SIZES.image_size // SIZES.patch) ** 2
GOAL = 2.0


def make_rows(steps: int) -> Rows:
    """Rows of ``steps`` steps; a row without an image has no pixels."""
    generator = torch.Generator().manual_seed(11)
    rows: Rows = []
    for _ in range(steps * STEP):
        has_image = torch.rand((), generator=generator).item() > 1 / 17
        visual = VISUAL if has_image else 0
        # Lognormal: a median of 160 tokens of text, and a long tail.
        wanted = math.exp(math.log(160) + 0.9 * torch.randn((), generator=generator).item())
        length = max(8, min(LONGEST - visual - 1, round(wanted)))
        text = torch.randint(5, SIZES.vocabulary, (length,), generator=generator)
        ids = torch.cat([torch.tensor([1]), torch.full((visual,), IMAGE_TOKEN), text])
        labels = torch.full_like(ids, -100)
        labels[-(length // 2) :] = ids[-(length // 2) :]
        row = {"input_ids": ids, "labels": labels}
        if has_image:
            row["pixel_values"] = torch.randn(3, SIZES.image_size, SIZES.image_size, generator=generator)
        rows.append(row)
    return rows


def pad(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as a batch, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), 3)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[place, :length], labels[place, :length], mask[place, :length] = row["input_ids"], row["labels"], 1
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
    return {**batch, "pixel_values": torch.stack(pixels)} if pixels else batch


class TrlPeer(Peer):
    """The same model under TRL's trainer."""

    def __init__(self, published: Path) -> None:
        super().__init__(published, GROUPS, naive=False)
        self.processor = AutoProcessor.from_pretrained(published)

    def trainer(self, rows: Rows, folder: Path, **given: Any) -> Trainer:
        """Over padded micro-batches, in order."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(
            **common_arguments(folder),
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=STEP // MICRO_BATCH,
            max_steps=len(rows) // STEP,
            gradient_checkpointing=False,
            bf16=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        # Its dataset has to be a table: of the rows' numbers.
        return in_order(SFTTrainer)(
            self.model,
            arguments,
            data_collator=lambda numbers: pad([rows[each["number"]] for each in numbers]),
            train_dataset=Dataset.from_dict({"number": list(range(len(rows)))}),
            processing_class=self.processor,
            **given,
        )

    def first_step(self, rows: Rows) -> Iterator[tuple[dict[str, Tensor], float]]:
        """Its padded micro-batches."""
        counts = [int((row["labels"][1:] != -100).sum()) for row in rows[:STEP]]
        for start in range(0, STEP, MICRO_BATCH):
            part = slice(start, start + MICRO_BATCH)
            yield pad(rows[part]), sum(counts[part]) / sum(counts)


class PackedOurs(Ours):
    """Our model, packed."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint, GROUPS)
        self.model.enable_packing(longest=LONGEST)
        self.spec = self.spec.model_copy(update={"batch_size": STEP, "packing": PackingSpec(tokens=TOKENS)})

    def steps(self, rows: Rows) -> Iterator[list[Batch]]:
        """Packed micro-batches; planning and packing count as training's time in neither side."""
        for start in range(0, len(rows), STEP):
            step = rows[start : start + STEP]
            sizes = [SampleSize(len(row["input_ids"]), int("pixel_values" in row)) for row in step]
            (shares,) = share_out(sizes, PackingSpec(tokens=TOKENS), num_ranks=1)
            yield [self._pack([step[place] for place in share]) for share in shares]

    def _pack(self, rows: Rows) -> Batch:
        (encoder,) = self.model.encoder_sizes
        encoded = [
            Encoded(
                input_ids=row["input_ids"].tolist(),
                supervised=(row["labels"] != -100).tolist(),
                image_spans=[(1, VISUAL)] if "pixel_values" in row else [],
            )
            for row in rows
        ]
        packed, segments = pack_row([], encoded)
        pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
        places = packed["input_ids"].numel()
        return Batch(
            pixel_values={encoder: torch.stack(pixels)} if pixels else {},
            size_inputs={},
            prefixes=None,
            branches=(),
            chains=None,
            packed=packed,
            segments=segments,
            num_supervised=sum(sum(each.supervised) for each in encoded),
            num_tokens=places,
            num_places=places,
            num_samples=len(rows),
        )


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """The ratio, in a Python that has TRL."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = make_rows(steps)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_peer_model(folder / "published", SIZES)
        convert(folder / "published", folder / "manyeyes")
        title = f"sft, lengths mixed: TRL's SFTTrainer, padded / ours, packed, {STEP} samples a step"
        return compare(
            "sft",
            title,
            PackedOurs(folder / "manyeyes"),
            TrlPeer(folder / "published"),
            rows,
            norms=True,
            goal=GOAL,
            rounds=rounds,
            folder=folder,
            packages=("trl",),
        )


def main() -> int:
    """Install TRL beside this Python, and measure there; exit 1 where the results differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="a round, the first of them dropped")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.inside:
        python, said = make_python(ROOT / "runs" / "bench" / "trl", "TRL", packages=(TRL,), imports=("trl",))
        print(said, file=sys.stderr)
        if python is None:
            return 0
        path = os.pathsep.join([str(ROOT), str(ROOT / "models"), os.environ.get("PYTHONPATH", "")])
        command = [str(python), "-m", "bench.sft", "--inside", *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
    return write_result(measure(arguments.rounds, arguments.steps), arguments.out / "sft.json")


if __name__ == "__main__":
    sys.exit(main())
