"""``python -m bench.training``: our stages beside transformers' ``Trainer`` over its own LLaVA, same work.

A small LLaVA (a vision transformer of 22 M parameters, a Llama of 26 M and its head of 16 M) is made on the spot in
transformers' format and converted. Each side trains some steps on the same tokens and pixels with its own loop and
AdamW; the first step is dropped, rounds are interleaved, and process CPU time of one thread is taken. Losses and
gradient norms are compared in every round and the gradients' direction once; a run in which they differ fails.

Stages: ``projector`` trains the projector alone, once more with the encoder's features kept from an epoch before;
``prealign`` the encoder and the projector. Of the latter the peer runs twice: with everything frozen that does not
train, and naively, where only the optimizer's list says what trains.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from bench import RESULTS, describe, write_result
from bench.peers_model import PeerModel, write_peer_model
from manyeyes.converters.convert import convert
from manyeyes.model import load_checkpoint
from manyeyes.recipe import MixturePart, Schedule, StageSpec
from manyeyes.training.ahead import StepBatches
from manyeyes.training.batches import Batch
from manyeyes.training.features import FeatureFiles, FrozenFeatures, FrozenImage, FrozenReader
from manyeyes.training.loop import batch_loss, loss_function, train
from manyeyes.training.optimizer import build_optimizer, freeze_others, learning_rates
from manyeyes.training.processes import Processes
from manyeyes.training.running import RunningCheckpoints
from manyeyes.training.throughput import ModelFlops

SIZES = PeerModel(image_size=224, patch=16, encoder_width=384, encoder_depth=13, vocabulary=32000)
BATCH, TEXT, SUPERVISED, RATE = 2, 32, 24, 1e-3
# No clipping: a naive peer would clip by the norm of gradients that it throws away.
NO_CLIPPING = 1e6
IMAGE_TOKEN = 4
Rows = list[dict[str, Tensor]]
TOLERANCE, LEAST_COSINE = 1e-5, 0.9999
# What trains, and the ratio that is wanted; of a naive peer, and with kept features.
STAGES: dict[str, tuple[tuple[str, ...], float]] = {
    "projector": (("projector",), 1.4),
    "projector_kept": (("projector",), 1.65),
    "prealign": (("encoders", "projector"), 1.3),
    "prealign_naive": (("encoders", "projector"), 2.2),
}
TITLES = {
    "projector": "projector",
    "projector_kept": "projector, features kept before",
    "prealign": "prealign",
    "prealign_naive": "prealign, nothing frozen by theirs",
}
# Of the peer, what trains; the rest is its language model.
_TRAINED = {
    "projector": ("multi_modal_projector",),
    "encoders": ("vision_tower",),
    "language_model": ("language_model", "lm_head"),
}


@dataclass(frozen=True)
class Outcome:
    """What a side gave in one round: CPU seconds a step, and every step's loss and gradient norm."""

    seconds: float
    losses: list[float]
    norms: list[float]


def make_rows(steps: int) -> Rows:
    """Rows of ``steps`` batches: an image and 32 tokens of text, 24 of them supervised."""
    generator = torch.Generator().manual_seed(7)
    visual = (SIZES.image_size // SIZES.patch) ** 2
    rows = []
    for _ in range(steps * BATCH):
        text = torch.randint(5, SIZES.vocabulary, (TEXT,), generator=generator)
        ids = torch.cat([torch.tensor([1]), torch.full((visual,), IMAGE_TOKEN), text[1:]])
        labels = torch.full_like(ids, -100)
        labels[-SUPERVISED:] = ids[-SUPERVISED:]
        pixels = torch.randn(3, SIZES.image_size, SIZES.image_size, generator=generator)
        rows.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    return rows


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of one length as a batch."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def common_arguments(folder: Path) -> dict[str, Any]:
    """Of every peer's trainer."""
    return {
        "output_dir": str(folder),
        "max_grad_norm": NO_CLIPPING,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }


def in_order(trainer: type[Trainer]) -> type[Trainer]:
    """A trainer that takes its rows as they come."""

    class _InOrder(trainer):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler[int]:  # noqa: ARG002
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return _InOrder


class Peer:
    """transformers' LLaVA under its ``Trainer``."""

    def __init__(self, published: Path, groups: Sequence[str], *, naive: bool) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(published, dtype=torch.float32).train()
        marks = [mark for group in groups for mark in _TRAINED[group]]
        self.trained = [own for name, own in self.model.named_parameters() if any(mark in name for mark in marks)]
        if not naive:
            self.model.requires_grad_(False)
            for parameter in self.trained:
                parameter.requires_grad_(True)
        self.start = [parameter.detach().clone() for parameter in self.trained]

    def run(self, rows: Rows, folder: Path) -> Outcome:
        """Train once from the first weights."""
        _restore(self.trained, self.start)
        marks: list[float] = []

        class _Clock(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
                marks.append(time.process_time())

        # fused, as ours; its own default on a CPU is not.
        optimizer = torch.optim.AdamW(self.trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        trainer = self.trainer(rows, folder, optimizers=(optimizer, constant), callbacks=[_Clock()])
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        return Outcome(
            (marks[-1] - marks[0]) / (len(marks) - 1),
            [float(entry["loss"]) for entry in logged],
            [float(entry["grad_norm"]) for entry in logged],
        )

    def trainer(self, rows: Rows, folder: Path, **given: Any) -> Trainer:
        """Over rows of one length, in order."""
        arguments = TrainingArguments(
            **common_arguments(folder), per_device_train_batch_size=BATCH, max_steps=len(rows) // BATCH
        )
        return in_order(Trainer)(self.model, arguments, data_collator=collate, train_dataset=rows, **given)

    def gradients(self, rows: Rows, folder: Path) -> dict[str, Tensor]:
        """Of the first batch, by our names: gradients take the place of weights and are converted like them."""
        _restore(self.trained, self.start)
        self.model.zero_grad()
        for batch, share in self.first_step(rows):
            (self.model(**batch).loss * share).backward()
        with torch.no_grad():
            for parameter in self.trained:
                parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
        self.model.save_pretrained(folder / "gradients", max_shard_size="10GB")
        _restore(self.trained, self.start)
        for extra in (folder / "published").iterdir():
            if not (folder / "gradients" / extra.name).exists():
                (folder / "gradients" / extra.name).write_bytes(extra.read_bytes())
        convert(folder / "gradients", folder / "gradients-converted")
        model, _ = load_checkpoint(folder / "gradients-converted")
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    def first_step(self, rows: Rows) -> Iterator[tuple[dict[str, Tensor], float]]:
        """The batches of the first step, and how much each one's mean counts."""
        yield collate(rows[:BATCH]), 1.0


class _Stream:
    """Ready batches, and the time at which each step asks for its own."""

    waited_s = 0.0

    def __init__(self, batches: Sequence[list[Batch]], complete: Callable[[Batch], Batch]) -> None:
        self._batches = iter(batches)
        self._complete = complete
        self.asked: list[float] = []

    def go_to(self, step: int) -> None:
        """All from the first."""

    def next_step(self) -> StepBatches:
        """The next step's."""
        self.asked.append(time.process_time())
        made = [self._complete(batch) for batch in next(self._batches)]
        return StepBatches(sum(batch.num_supervised for batch in made), iter(made))


class Ours:
    """Our model in our loop."""

    def __init__(self, checkpoint: Path, groups: Sequence[str]) -> None:
        self.model, _ = load_checkpoint(checkpoint)
        self.model.train()
        self.spec = StageSpec(
            train=dict.fromkeys(groups, RATE),
            mixture=(MixturePart(dataset="ready"),),
            batch_size=BATCH,
            schedule=Schedule(kind="constant", warmup_ratio=0.0),
            checkpoint_every_s=1e9,
            max_grad_norm=NO_CLIPPING,
        )
        self.groups = self.model.parameter_groups()
        self.rates = learning_rates(self.spec.train, self.groups)
        self.trained = freeze_others(self.groups, self.rates)
        self.start = [parameter.detach().clone() for parameter in self.trained.values()]
        self.processes = Processes(rank=0, size=1, device=torch.device("cpu"))

    def run(self, rows: Rows, folder: Path) -> Outcome:
        """Train once from the first weights."""
        _restore(list(self.trained.values()), self.start)
        planned = list(self.steps(rows))
        stream, steps = _Stream(planned, self.complete), len(planned)
        optimizer = build_optimizer(self.groups, self.rates, self.spec)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        state, _ = train(
            loss_function(self.model, self.spec, processes=self.processes, sharded=False),
            stream,  # type: ignore[arg-type]
            self.spec,
            steps=steps,
            num_samples=len(rows),
            parameters=self.trained,
            optimizer=optimizer,
            processes=self.processes,
            checkpoints=RunningCheckpoints(
                folder,
                facts={},
                parameters=self.trained,
                optimizer=optimizer,
                processes=self.processes,
                every_s=self.spec.checkpoint_every_s,
            ),
            flops=ModelFlops(self.model),
            seed=0,
            report=lambda *_: None,
        )
        seconds = (time.process_time() - stream.asked[1]) / (steps - 1)
        return Outcome(seconds, [point.loss for point in state.history], [point.grad_norm for point in state.history])

    def gradients(self, rows: Rows) -> dict[str, Tensor]:
        """Of the first batch, by name."""
        _restore(list(self.trained.values()), self.start)
        self.model.zero_grad()
        first = next(iter(self.steps(rows)))
        supervised = sum(batch.num_supervised for batch in first)
        for batch in map(self.complete, first):
            (batch_loss(self.model, batch, device=self.processes.device) / supervised).backward()
        found = {name: own.grad.clone() for name, own in self.trained.items() if own.grad is not None}
        self.model.zero_grad()
        return found

    def complete(self, batch: Batch) -> Batch:
        """What a step does to a batch before it trains on it."""
        return batch

    def steps(self, rows: Rows) -> Iterator[list[Batch]]:
        """Micro-batches of each step."""
        (encoder,) = self.model.encoder_sizes
        visual = (SIZES.image_size // SIZES.patch) ** 2
        for start in range(0, len(rows), BATCH):
            batch = collate(rows[start : start + BATCH])
            spans = torch.tensor([[row, 1, visual, row] for row in range(BATCH)])
            made = Batch(
                pixel_values={encoder: batch.pop("pixel_values")},
                size_inputs={},
                prefixes=None,
                branches=(),
                chains={**batch, "image_spans": spans},
                packed=None,
                segments=None,
                num_supervised=BATCH * SUPERVISED,
                num_tokens=batch["input_ids"].numel(),
                num_places=batch["input_ids"].numel(),
                num_samples=BATCH,
            )
            yield [made]


class OursKept(Ours):
    """Ours, with the encoder's features read from files that a first epoch wrote."""

    def __init__(self, checkpoint: Path, groups: Sequence[str], rows: Rows, folder: Path) -> None:
        super().__init__(checkpoint, groups)
        (self.name,) = self.model.encoder_sizes
        self.folder = folder
        self.frozen = self._open()
        for step in self.steps(rows):
            self.complete(step[0])
        self.frozen.write()

    def _open(self) -> FrozenFeatures:
        files = {self.name: FeatureFiles(self.folder, "k" * 32, most_bytes=2**30)}
        reader = FrozenReader([self.name], [], shared=False, files=files)
        return FrozenFeatures(
            self.model, reader, files=files, plans=(), device=self.processes.device, precision=self.spec.precision
        )

    def run(self, rows: Rows, folder: Path) -> Outcome:
        """With files that are opened anew, and whose checksums are looked at."""
        self.frozen = self._open()
        return super().run(rows, folder)

    def complete(self, batch: Batch) -> Batch:
        """Read what is kept."""
        return replace(batch, frozen=(), features=self.frozen.complete(batch.frozen))

    def steps(self, rows: Rows) -> Iterator[list[Batch]]:
        """Micro-batches without pixels."""
        for (batch,) in super().steps(rows):
            images = batch.pixel_values[self.name].split(1)
            digests = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]
            frozen = [FrozenImage(own, {}, {self.name: image}) for own, image in zip(digests, images, strict=True)]
            yield [replace(batch, pixel_values={}, frozen=tuple(frozen))]


def _restore(parameters: Sequence[Tensor], start: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, first in zip(parameters, start, strict=True):
            parameter.copy_(first)


def compare(
    name: str,
    title: str,
    ours: Ours,
    peer: Peer,
    rows: Rows,
    *,
    norms: bool,
    goal: float,
    rounds: int,
    folder: Path,
    packages: Sequence[str] = (),
) -> dict[str, Any]:
    """One ratio, as its JSON file has it."""
    own, theirs = ours.gradients(rows), peer.gradients(rows, folder)
    flat = [torch.cat([side[key].flatten() for key in own]).double() for side in (own, theirs)]
    cosine = float(torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0))
    seconds, gap = [], 0.0
    for number in range(rounds + 1):
        a, b = peer.run(rows, folder / "trainer"), ours.run(rows, folder / "running")
        for left, right in [(a.losses, b.losses), (a.norms, b.norms)][: 1 + norms]:
            gap = max(gap, *(abs(x / y - 1) for x, y in zip(left, right, strict=True)))
        if number:
            seconds.append((a.seconds, b.seconds))
            print(f"  {name}: {a.seconds / b.seconds:.2f}", file=sys.stderr, flush=True)
    evidence = {
        "loss_and_norm_gap" if norms else "loss_gap": gap,
        "gradient_cosine": cosine,
        "equal": gap < TOLERANCE and cosine > LEAST_COSINE,
    }
    return describe(title, seconds, goal=goal, equal=evidence, packages=packages)


def main() -> int:
    """Measure every stage; exit 1 where a result differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="a round, the first of them dropped")
    parser.add_argument("--only", choices=tuple(STAGES), nargs="+", default=tuple(STAGES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_peer_model(folder / "published", SIZES)
        convert(folder / "published", folder / "manyeyes")
        rows = make_rows(arguments.steps)
        for name in arguments.only:
            (groups, goal), naive = STAGES[name], name.endswith("_naive")
            title = f"{TITLES[name]}: transformers' Trainer and LLaVA / ours, {BATCH} images a step"
            peer = Peer(folder / "published", groups, naive=naive)
            if name.endswith("_kept"):
                ours: Ours = OursKept(folder / "manyeyes", groups, rows, folder / "features")
            else:
                ours = Ours(folder / "manyeyes", groups)
            result = compare(
                name, title, ours, peer, rows, norms=not naive, goal=goal, rounds=arguments.rounds, folder=folder
            )
            failed |= write_result(result, arguments.out / f"{name}.json")
    return failed


if __name__ == "__main__":
    sys.exit(main())
