"""How it is trained: ``stages`` in a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from manyeyes.recipe.strict import MAX_BATCH, MAX_COUNT, Strict

StageName = Literal["prealign", "pretrain", "sft"]
# Adam's own rates are below 1e-2; a rate beyond this is a slip of the keyboard.
LearningRate = Annotated[float, Field(gt=0, le=10)]
Decay = Annotated[float, Field(ge=0, lt=1)]
STAGE_NAMES: tuple[StageName, ...] = ("prealign", "pretrain", "sft")


class MixturePart(Strict):
    """One data set of a mixture."""

    dataset: str = Field(description="A data set of the snapshot, for instance easy-vqa-train.")
    turns: Literal["independent", "chained"] = Field(
        default="chained",
        description="independent: each turn sees the image and itself alone. chained: turns follow each other, "
        "as order says.",
    )
    order: Literal["shuffled", "recorded"] = Field(
        default="shuffled",
        description="Of chained turns: shuffled anew each epoch, for questions that stand alone; recorded, for "
        "conversations.",
    )
    image_dropout: float = Field(
        default=0.0, ge=0, le=1, description="Share of samples shown without their image, redrawn each epoch."
    )
    max_samples: int | None = Field(default=None, gt=0, le=MAX_COUNT)
    questions: Literal["record", "brief"] = Field(
        default="record",
        description="record: as the records ask. brief: for captions, one of LLaVA's eleven ways to ask for a brief "
        "description, redrawn each epoch.",
    )


class Schedule(Strict):
    """Learning rate over a stage."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)


class LoraSpec(Strict):
    """Low-rank adapters on the linear layers of the language model, its head left out (arXiv:2106.09685).

    ``train.language_model`` is their learning rate; the layers themselves stay frozen. The stage's result has the
    adapters merged into the weights.
    """

    rank: int = Field(gt=0, le=65_536, description="Width of an adapter.")
    alpha: float = Field(gt=0, le=1e6, description="An adapter's output is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Of an adapter's input.")


class StageSpec(Strict):
    """One training stage. A group that ``train`` does not name is frozen, bit for bit."""

    train: dict[str, LearningRate] = Field(
        min_length=1,
        description="Learning rate by group: encoders, encoders.<name>, fusion, fusion.<part of it>, projector, "
        "language_model.",
    )
    encoders: tuple[str, ...] | None = Field(default=None, description="prealign only: which encoders; all by default.")
    mixture: tuple[MixturePart, ...] = Field(min_length=1)
    epochs: int = Field(default=1, gt=0, le=100_000)
    max_steps: int | None = Field(default=None, gt=0, le=MAX_COUNT, description="Stop after N optimizer steps.")
    max_samples: int | None = Field(
        default=None, gt=0, le=MAX_COUNT, description="Stop after N records, epochs counted."
    )
    batch_size: int = Field(gt=0, le=MAX_BATCH, description="Records (images) an optimizer step, over all processes.")
    micro_batch_size: int | None = Field(
        default=None, gt=0, le=MAX_BATCH, description="Records a forward pass; batch_size if unset."
    )
    schedule: Schedule = Schedule()
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    betas: tuple[Decay, Decay] = Field(
        default=(0.9, 0.95),
        description="AdamW's. 0.999 as the second is transformers' default, and the published runs'.",
    )
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e9)
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_encoders: bool = Field(
        default=False,
        description="Trained encoders compute the inside of their blocks again in the backward pass instead of keeping "
        "it: less memory, more time, the same gradients.",
    )
    too_long: Literal["refuse", "cut"] = Field(
        default="refuse",
        description="A conversation of more tokens than model.language_model.max_length is refused (validate_data "
        "leaves it out, a stage by itself stops), or is cut.",
    )
    template: str | None = Field(
        default=None, description="A row of CHAT_TEMPLATES for this stage alone; model.chat's when left out."
    )
    fit: Literal["stretch", "crop", "pad"] | None = Field(
        default=None,
        description="What happens to images that are not square in this stage alone; the encoders' own when left out.",
    )
    model: dict[str, Any] | None = Field(
        default=None,
        description="What of model is otherwise in this stage alone, by dotted path, for instance "
        "{shared.image_size: 768, layout: null}; the parameters must keep their shapes.",
    )
    lora: LoraSpec | None = Field(
        default=None, description="Train adapters of the language model in place of the language model."
    )
    checkpoint_every_s: float = Field(default=30.0, gt=0, le=1e9, description="Seconds between running checkpoints.")

    @model_validator(mode="after")
    def _adapters_have_a_rate(self) -> StageSpec:
        if self.lora is not None and "language_model" not in self.train:
            raise ValueError("lora needs train.language_model, the learning rate of its adapters")
        return self


class StagesSpec(Strict):
    """The stages, in order; a recipe may leave one out."""

    prealign: StageSpec | None = None
    pretrain: StageSpec | None = None
    sft: StageSpec | None = None
