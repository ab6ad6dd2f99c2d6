"""Admission: whether a record can be trained on, asked of the code that makes batches, before anything is trained.

A record may be whole and still stop a stage: a conversation longer than the language model takes, with this recipe's
visual tokens; an image of which unpadding leaves nothing; a second question where a mixture wants captions. What a
mixture draws (order of turns, dropped images, questions) is a function of seed, epoch and row, so each draw of each
stage is tried, and nothing else.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from manyeyes.data.mixture import draw_sample
from manyeyes.data.records import Record, SampleProblem
from manyeyes.errors import RecordError
from manyeyes.model import build_processor
from manyeyes.processor import ManyEyesProcessor
from manyeyes.recipe import MixturePart, Recipe, StageSpec
from manyeyes.training.batches import SampleEncoder, processor_of_stage, shown_images, stage_seed

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
                        epochs=spec.epochs if _draws(part) else 1,
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


def _draws(part: MixturePart) -> bool:
    """Whether a record comes differently in different epochs."""
    shuffled = part.turns == "chained" and part.order == "shuffled"
    return shuffled or 0 < part.image_dropout < 1 or part.questions == "brief"
