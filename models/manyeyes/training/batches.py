"""From samples of a mixture to batches: every image decoded once, every conversation tokenised once.

``Admission`` says whether a record can be trained on, asked of the code that makes batches, before anything is trained.

A record may be whole and still stop a stage: a conversation longer than the language model takes, with this recipe's
visual tokens; an image of which unpadding leaves nothing; a second question where a mixture wants captions. What a
mixture draws (order of turns, dropped images, questions) is a function of seed, epoch and row, so each draw of each
stage is tried, and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from manyeyes.chat import IGNORE_INDEX, BranchGroup, split_branches
from manyeyes.data.mixture import Mixture, Sample, draw_sample
from manyeyes.data.records import ImageFile, Record, SampleProblem
from manyeyes.errors import RecordError
from manyeyes.model import build_processor
from manyeyes.model.segments import Segments
from manyeyes.processor import CutImage, ManyEyesProcessor
from manyeyes.recipe import MixturePart, Recipe, StageName, StageSpec
from manyeyes.runtime.chat import Encoded
from manyeyes.runtime.preprocess import read_decoded_size
from manyeyes.training.features import FrozenImage, FrozenReader
from manyeyes.training.packing import SampleSize, pack_row

PIXELS_IN_MEMORY_BYTES = 2 * 1024**3
CONVERSATIONS_IN_MEMORY = 100_000
# Questions differ in length by a half: in one rectangle a quarter of the tokens of easy-VQA would be padding.
BUCKETS = 3
MIN_BUCKET = 32


@dataclass(frozen=True)
class Batch:
    """Samples of one forward pass.

    Attributes:
        pixel_values: ``[I, 3, size, size]`` by encoder name, with tiles one a tile, float32; empty without images, and
            without encoders that train where features are kept.
        size_inputs: ``layout`` and ``image_sizes``, where the model must know of images' sizes; empty without images.
        prefixes: ``input_ids`` and ``attention_mask`` ``[R, P]`` and ``image_spans`` of the independent samples,
            padded on the left; None when there are none.
        branches: What follows the prefixes, in buckets of like length: ``rows`` ``[Q]``, ``input_ids``,
            ``attention_mask`` and ``labels`` ``[Q, L]``, padded on the right.
        chains: What ``ManyEyesProcessor.pad`` made of the chained samples; None when there are none. Their images
            follow those of the prefixes.
        packed: What ``packing.pack_row`` made of all samples, in place of the three before; None without packing.
        segments: Whose each token of that row is.
        num_supervised: Tokens that the loss counts.
        num_tokens: Tokens of the language model, visual ones included.
        num_places: Those and padding.
        num_samples: Samples.
        frozen: Where features are kept, each image for the encoders that do not train.
        features: What became of it: ``[I, C_k, h_k, w_k]`` by encoder name.
    """

    pixel_values: dict[str, Tensor]
    size_inputs: dict[str, Tensor]
    prefixes: dict[str, Tensor] | None
    branches: tuple[dict[str, Tensor], ...]
    chains: dict[str, Tensor] | None
    packed: dict[str, Tensor] | None
    segments: Segments | None
    num_supervised: int
    num_tokens: int
    num_places: int
    num_samples: int
    frozen: tuple[FrozenImage, ...] = ()
    features: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_calls(self) -> int:
        """How often ``loop.batch_loss`` calls the decoder."""
        prefixes = self.prefixes is not None and self.prefixes["input_ids"].shape[1] > 0
        return (self.packed is not None) + prefixes + len(self.branches) + (self.chains is not None)

    def pin_memory(self) -> Batch:
        """The batch in memory that a GPU can fetch by itself, while the CPU goes on."""
        return replace(self, **{each.name: _pinned(getattr(self, each.name)) for each in fields(self)})


def _pinned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.pin_memory()
    if isinstance(value, dict):
        return {name: _pinned(own) for name, own in value.items()}
    return tuple(_pinned(own) for own in value) if isinstance(value, tuple) else value


class SampleEncoder:
    """From a sample to tokens, as batches hold them; pixels are not looked at.

    Args:
        processor: The model's.
        too_long: What becomes of conversations of more tokens than the language model takes.
        kept: How many conversations stay in memory.
    """

    def __init__(
        self, processor: ManyEyesProcessor, *, too_long: Literal["refuse", "cut"], kept: int = CONVERSATIONS_IN_MEMORY
    ) -> None:
        self._processor = processor
        self._too_long = too_long
        self._encode = lru_cache(maxsize=kept)(self._encode_uncached)

    def encode(
        self, sample: Sample, image_sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[Encoded], BranchGroup | None]:
        """The sample's conversations, and the branches that independent ones become.

        Args:
            sample: As a mixture shows it.
            image_sizes: Width and height of each image that is shown, as decoded, in pixels.

        Raises:
            RecordError: A conversation cannot be used.
        """
        # Where sizes do not matter, images of any size share a tokenised text.
        sizes = tuple(image_sizes) if self._processor.layout is not None else None
        conversations = [
            self._encode(tuple((turn.speaker, turn.text) for turn in turns), len(image_sizes), sizes)
            for turns in sample.conversations()
        ]
        return conversations, split_branches(conversations) if sample.turns == "independent" else None

    def _encode_uncached(
        self, turns: tuple[tuple[str, str], ...], num_images: int, image_sizes: tuple[tuple[int, int], ...] | None
    ) -> Encoded:
        return self._processor.encode(turns, num_images=num_images, image_sizes=image_sizes, too_long=self._too_long)


@dataclass(frozen=True)
class _Shown:
    """An image as a batch is made of it.

    Attributes:
        size: Width and height as decoded, in pixels, where they matter.
        cut: What encoders are given that run in any case; None where there are none.
        frozen: For the others, where features are kept.
    """

    size: tuple[int, int]
    cut: CutImage | None = None
    frozen: FrozenImage | None = None


class BatchBuilder:
    """Makes batches from positions in the stream of samples; epochs follow each other in it without a gap.

    Args:
        mixture: Which sample comes when.
        processor: The model's.
        too_long: What becomes of conversations of more tokens than the language model takes.
        packed: Whether a batch is one row without padding.
        frozen: Where features are kept: finds them.
        sharers: How many builders share the memory for what comes again.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: ManyEyesProcessor,
        *,
        too_long: Literal["refuse", "cut"] = "refuse",
        packed: bool = False,
        frozen: FrozenReader | None = None,
        sharers: int = 1,
    ) -> None:
        self._mixture = mixture
        self._processor = processor
        self._too_long = too_long
        self._packed = packed
        self._frozen = frozen
        self._sharers = sharers
        self._encoder = SampleEncoder(processor, too_long=too_long, kept=CONVERSATIONS_IN_MEMORY // sharers)
        self._cut: dict[str, CutImage] = {}
        self._cut_bytes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process makes its own from the same arguments."""
        made = partial(
            BatchBuilder,
            too_long=self._too_long,
            packed=self._packed,
            frozen=self._frozen,
            sharers=self._sharers,
        )
        return made, (self._mixture, self._processor)

    def for_worker(self, workers: int) -> BatchBuilder:
        """One that makes the same batches, for one of several processes that share this one's memory."""
        return BatchBuilder(
            self._mixture,
            self._processor,
            too_long=self._too_long,
            packed=self._packed,
            frozen=self._frozen,
            sharers=workers,
        )

    def sample(self, position: int) -> Sample:
        """The sample at a position, as ``build`` counts them.

        Raises:
            RecordError: The row is no record.
            SnapshotError: A shard cannot be read.
        """
        return self._mixture.sample(*divmod(position, len(self._mixture)))

    def count(self, positions: Sequence[int]) -> int:
        """``num_supervised`` of the batch of these positions; no pixels are made for it.

        Args:
            positions: As for ``build``.

        Raises:
            RecordError: A conversation cannot be used.
            SnapshotError: A shard cannot be read.
        """
        return sum(self._count(self.sample(position)) for position in positions)

    def _count(self, sample: Sample) -> int:
        conversations, group, _ = self._read(sample)
        if group is None:
            return sum(sum(conversation.supervised) for conversation in conversations)
        return sum(label != IGNORE_INDEX for branch in group.branches for label in branch.labels)

    def measure(self, position: int) -> SampleSize:
        """What the sample at a position costs; no pixels are made for it.

        Args:
            position: As for ``build``.

        Raises:
            RecordError: A conversation cannot be used.
            SnapshotError: A shard cannot be read.
        """
        conversations, group, sizes = self._read(self.sample(position))
        images = self._processor.count_tiles(sizes)
        if group is None:
            return SampleSize(sum(len(conversation.input_ids) for conversation in conversations), images)
        return SampleSize(len(group.prefix_ids) + sum(len(branch.input_ids) for branch in group.branches), images)

    def _read(self, sample: Sample) -> tuple[list[Encoded], BranchGroup | None, list[tuple[int, int]]]:
        """A sample's tokens, and its images' sizes."""
        with sample.named():
            # Where sizes do not matter, any will do.
            measure = read_decoded_size if self._processor.layout is not None else lambda _: (0, 0)
            sizes = [measure(image.data) for image in shown_images(sample)]
            return (*self._encoder.encode(sample, sizes), sizes)

    def build(self, positions: Sequence[int]) -> Batch:
        """The batch of these positions.

        Args:
            positions: From 0; position ``len(mixture)`` is the first sample of the second epoch.

        Raises:
            RecordError: A conversation or an image cannot be used; names the data set and the record.
            SnapshotError: A shard cannot be read.
        """
        samples = [self.sample(position) for position in positions]
        independent = [sample for sample in samples if sample.turns == "independent"]
        chained = [sample for sample in samples if sample.turns == "chained"]
        images: list[list[_Shown]] = []
        groups: list[BranchGroup] = []
        chains: list[Encoded] = []
        for sample in (*independent, *chained):
            with sample.named():
                images.append([self._show(image) for image in shown_images(sample)])
                conversations, group = self._encoder.encode(sample, [image.size for image in images[-1]])
                if group is None:
                    chains += conversations
                else:
                    groups.append(group)
        shown = [image for own in images for image in own]
        packed = segments = prefixes = padded_chains = None
        branches: tuple[dict[str, Tensor], ...] = ()
        if self._packed:
            packed, segments = pack_row(groups, chains)
        else:
            prefixes, branches = _bucket(self._processor.pad_groups(groups)) if groups else (None, ())
            padded_chains = self._processor.pad(chains, side="right", labels=True) if chains else None
        if padded_chains is not None:
            padded_chains["image_spans"][:, 3] += sum(len(group.image_spans) for group in groups)
        parts = [part for part in (packed, prefixes, *branches, padded_chains) if part is not None]
        return Batch(
            pixel_values=self._normalize([image.cut for image in shown if image.cut is not None]),
            size_inputs=self._processor.size_inputs([image.size for image in shown]) if shown else {},
            prefixes=prefixes,
            branches=branches,
            chains=padded_chains,
            packed=packed,
            segments=segments,
            num_supervised=sum(int((part["labels"] != IGNORE_INDEX).sum()) for part in parts if "labels" in part),
            num_tokens=sum(
                int(part["attention_mask"].sum()) if "attention_mask" in part else part["input_ids"].numel()
                for part in parts
            ),
            num_places=sum(part["input_ids"].numel() for part in parts),
            num_samples=len(samples),
            frozen=tuple(image.frozen for image in shown if image.frozen is not None),
        )

    def _normalize(self, images: Sequence[CutImage]) -> dict[str, Tensor]:
        return self._processor.normalize_images(images) if images else {}

    def _show(self, image: ImageFile) -> _Shown:
        if self._frozen is None:
            cut = self._cut_image(image)
            return _Shown(size=cut.size, cut=cut)
        frozen = self._frozen.show(image.data, self._processor)
        matters = self._processor.layout is not None or self._processor.sends_image_sizes
        return _Shown(
            size=read_decoded_size(image.data) if matters else (0, 0),
            cut=self._cut_image(image, names=self._frozen.live) if self._frozen.live else None,
            frozen=frozen,
        )

    def _cut_image(self, image: ImageFile, *, names: Sequence[str] | None = None) -> CutImage:
        """An image's tiles as ``uint8``, from memory while there is room."""
        known = self._cut.get(image.sha256)
        if known is not None:
            return known
        cut = self._processor.cut_image(image.data, names=names)
        if self._cut_bytes + cut.nbytes <= PIXELS_IN_MEMORY_BYTES // self._sharers:
            self._cut[image.sha256] = cut
            self._cut_bytes += cut.nbytes
        return cut


def stage_seed(recipe: Recipe, stage: StageName, encoder: str | None) -> int:
    """What a stage draws its numbers from; each stage, and each encoder that is prealigned, draws others."""
    text = f"{recipe.seed}/{stage}/{encoder or ''}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def processor_of_stage(processor: ManyEyesProcessor, spec: StageSpec) -> ManyEyesProcessor:
    """The processor that a stage trains with: the model's, with the stage's own template and fit where it names them.

    Args:
        processor: The model's, which its checkpoints keep.
        spec: The stage.

    Raises:
        RecipeError: No such template.
    """
    if spec.template is None and spec.fit is None:
        return processor
    fit = {} if spec.fit is None else {"fit": spec.fit}
    return ManyEyesProcessor(
        processor.tokenizer,
        transforms={name: {**values, **fit} for name, values in processor.transforms.items()},
        template=spec.template or processor.template,
        system=processor.system if spec.template is None else None,
        num_image_tokens=processor.num_image_tokens,
        image_token_id=processor.image_token_id,
        max_length=processor.max_length,
        layout=processor.layout,
        sends_image_sizes=processor.sends_image_sizes,
    )


def _bucket(padded: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[dict[str, Tensor], ...]]:
    """Sort branches by length into buckets, and cut each to its longest.

    Args:
        padded: From ``ManyEyesProcessor.pad_groups``.

    Returns:
        Prefixes and buckets, as in ``Batch``.
    """
    lengths = padded["attention_mask"].sum(1)
    order = torch.argsort(lengths, stable=True)
    buckets = []
    for chosen in order.chunk(max(1, min(BUCKETS, len(order) // MIN_BUCKET))):
        longest = int(lengths[chosen].max())
        buckets.append(
            {
                "rows": padded["rows"][chosen],
                **{name: padded[name][chosen, :longest] for name in ("input_ids", "attention_mask", "labels")},
            }
        )
    prefixes = {
        "input_ids": padded["prefix_ids"],
        "attention_mask": padded["prefix_mask"],
        "image_spans": padded["image_spans"],
    }
    return prefixes, tuple(buckets)


def shown_images(sample: Sample) -> tuple[ImageFile, ...]:
    """The sample's images; none where the mixture drops them."""
    return () if sample.image_dropped else sample.record.images


# A record is asked about for all its uses at once; what repeats is the short questions of some data sets.
_CONVERSATIONS_KEPT = 10_000


@dataclass(frozen=True)
class _Use:
    """One part of one stage's mixture.

    Attributes:
        stage: The stage, with its encoder in brackets where it trains one alone.
        part: What the mixture says of its data set.
        number: Its place in the mixture.
        seed: Of the mixture.
        epochs: Epochs in which samples come differently; one where nothing is drawn.
        encoder: Tokenises them.
    """

    stage: str
    part: MixturePart
    number: int
    seed: int
    epochs: int
    encoder: SampleEncoder


class Admission:
    """What the stages of a recipe refuse.

    Args:
        recipe: Its stages are asked.
        snapshot_path: Folder of the data snapshot, for ``snapshot:`` sources.

    Raises:
        RecipeError: The recipe names something that there is not.
        SourceError: The language model's configuration or tokenizer cannot be had.
        ShapeError: Parts of the model do not fit together.
    """

    def __init__(self, recipe: Recipe, *, snapshot_path: Path | None) -> None:
        self._uses: list[_Use] = []
        encoders: dict[Hashable, SampleEncoder] = {}
        for stage, spec in recipe.present_stages():
            model = recipe.stage_model(stage)
            for name in recipe.prealigned_encoders() if stage == "prealign" else (None,):
                chosen = None if name is None else [name]
                processor = build_processor(model, snapshot_path=snapshot_path, encoders=chosen)
                processor = processor_of_stage(processor, spec)
                # Stages that make the same tokens of a text share their memory of it.
                tokens = (model.language_model.source, *_what_tokens_depend_on(processor, spec))
                encoder = encoders.setdefault(
                    tokens, SampleEncoder(processor, too_long=spec.too_long, kept=_CONVERSATIONS_KEPT)
                )
                self._uses += [
                    _Use(
                        stage=stage if name is None else f"{stage}[{name}]",
                        part=part,
                        number=number,
                        seed=stage_seed(recipe, stage, name),
                        epochs=spec.epochs if part.draws else 1,
                        encoder=encoder,
                    )
                    for number, part in enumerate(spec.mixture)
                ]

    def find_problem(
        self, record: Record, *, dataset: str, row: int, image_sizes: Sequence[tuple[int, int]]
    ) -> SampleProblem | None:
        """The first thing that a stage would refuse; None where every stage takes the record as often as it comes.

        Args:
            record: Whole: ``manyeyes.data.records.check_record`` has nothing against it.
            dataset: Its data set.
            row: Its place there.
            image_sizes: Width and height of each image as decoded, in pixels.
        """
        tried: set[Hashable] = set()  # most stages and epochs show a record alike
        for use in self._uses:
            if use.part.dataset != dataset:
                continue
            for epoch in range(use.epochs):
                try:
                    sample = draw_sample(record, use.part, number=use.number, row=row, seed=use.seed, epoch=epoch)
                    shown = (use.encoder, sample.turns, sample.order, sample.image_dropped, sample.record.turns)
                    if shown not in tried:
                        use.encoder.encode(sample, image_sizes if shown_images(sample) else ())
                        tried.add(shown)
                except RecordError as error:
                    needed = error.needed.removesuffix(" are allowed").removesuffix(" is needed")
                    return SampleProblem(f"stage {use.stage} refuses it: {error.found}", needed)
        return None


def _what_tokens_depend_on(processor: ManyEyesProcessor, spec: StageSpec) -> tuple[Hashable, ...]:
    return (
        spec.too_long,
        processor.template,
        processor.system,
        processor.num_image_tokens,
        processor.max_length,
        repr(processor.layout),
    )
