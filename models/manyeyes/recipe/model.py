"""What the model is and how it is trained: ``model`` and ``stages`` in a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from manyeyes.errors import did_you_mean
from manyeyes.strict import StrictModel

# Beyond what any data set, batch or image has: a slip of the keyboard.
MAX_COUNT, MAX_BATCH, MAX_PIXELS = 10**12, 2**24, 16_384

# Beside the fields of a part of a recipe, in the object's own dictionary.
PART = "_part"


class Part(NamedTuple):
    """Of what a part of a recipe is a part.

    Attributes:
        reader: Who reads it.
        place: Its dotted path; empty for the recipe itself.
        paths: Of the recipe itself: the fields that it has.
    """

    reader: str
    place: str
    paths: tuple[str, ...]


class Strict(StrictModel):
    """A part of a recipe: unknown fields are refused, numbers are finite, and nothing changes after it was read."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, data: Any) -> Any:
        """Refuse ``epochs: yes``, which pydantic would read as 1."""
        for name, value in data.items() if isinstance(data, Mapping) else ():
            field = cls.model_fields.get(name)
            inside = set(_types_in(field.annotation)) if field else set()
            place = next(_truths(value, name), None) if inside & {int, float} and bool not in inside else None
            if place is not None:
                raise ValueError(f"{place} needs a number, not true or false")
        return data

    if not TYPE_CHECKING:  # a type checker would take every name for an attribute

        def __getattr__(self, name: str) -> Any:
            """Refuse to read a field that ``manyeyes.recipe.partial`` left out."""
            part = self.__dict__.get(PART)
            if part is None or name not in type(self).model_fields:
                return super().__getattr__(name)
            path = f"{part.place}.{name}".lstrip(".")
            raise RuntimeError(f"{part.reader} reads {path}, which its slice of the recipe lacks: add it to SLICES")


def model_inside(annotation: Any) -> Any:
    """The first pydantic model in a field's type; None without one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := model_inside(inner)) is not None), None)


def _types_in(annotation: Any) -> Iterator[Any]:
    arguments = get_args(annotation)
    if not arguments:
        yield annotation
    for argument in arguments:
        yield from _types_in(argument)


def _truths(value: Any, place: str) -> Iterator[str]:
    """Where a field's own value is a truth value; a part of a recipe inside it looks at its fields itself."""
    if isinstance(value, bool):
        yield place
    entries = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    )
    for key, entry in entries:
        yield from _truths(entry, f"{place}.{key}")


StageName = Literal["prealign", "pretrain", "sft"]
# Adam's own rates are below 1e-2; a rate beyond this is a slip of the keyboard.
LearningRate = Annotated[float, Field(gt=0, le=10)]
Decay = Annotated[float, Field(ge=0, lt=1)]
STAGE_NAMES: tuple[StageName, ...] = ("prealign", "pretrain", "sft")
MAX_EPOCHS = 100_000


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

    @property
    def draws(self) -> bool:
        """Whether a record comes differently in different epochs."""
        shuffled = self.turns == "chained" and self.order == "shuffled"
        return shuffled or 0 < self.image_dropout < 1 or self.questions == "brief"


Samples = Annotated[int, Field(gt=0, le=MAX_COUNT)]


class DrawnSource(Strict):
    """What a draw says of the records of some sources."""

    category: str | None = Field(
        default=None, min_length=1, description="Ratios are among categories; the table of sources says it by default."
    )
    cap: Samples | None = Field(default=None, description="Most samples of each of these sources, in place of cap.")


class DrawSpec(Strict):
    """A draw from a stage's data sets, as a curation recipe's, with nothing copied (docs/curation.md)."""

    cap: Samples | None = Field(default=None, description="Most samples of one source: Cambrian-1's t.")
    ratio: dict[str, Annotated[float, Field(gt=0, le=1e9)]] = Field(
        default={}, description="Parts of each category; those without one are left out. All that there is by default."
    )
    total: Samples | None = Field(default=None, description="Most samples altogether.")
    sources: dict[str, DrawnSource] = Field(
        default={},
        description="By the records' source; * stands for any letters, and the first that fits counts.",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Another seed draws other samples.")


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
    quantize: Literal["nf4"] | None = Field(
        default=None,
        description="Hold the layers that have adapters in 4 bits while they train (QLoRA, arXiv:2305.14314); as they "
        "are when left out.",
    )


class PackingSpec(Strict):
    """Samples of different lengths share a row without padding; each sees itself alone. Losses are those without it.

    A step's samples are shared out so that every process has about as much; a sample that is larger than a micro-batch
    stands alone.
    """

    tokens: int = Field(gt=0, le=MAX_COUNT, description="Tokens of a micro-batch, visual tokens included.")
    images: int | None = Field(
        default=None,
        gt=0,
        le=MAX_COUNT,
        description="Images of a micro-batch, each tile counted; as many as come when left out.",
    )


class StageSpec(Strict):
    """One training stage. A group that ``train`` does not name is frozen, bit for bit."""

    train: dict[str, LearningRate] = Field(
        min_length=1,
        description="Learning rate by group: encoders, encoders.<name>, fusion, fusion.<part of it>, projector, "
        "language_model.",
    )
    encoders: tuple[str, ...] | None = Field(default=None, description="prealign only: which encoders; all by default.")
    mixture: tuple[MixturePart, ...] = Field(min_length=1)
    draw: DrawSpec | None = Field(
        default=None, description="Which of the mixture's samples are trained on; all when left out."
    )
    epochs: int = Field(default=1, gt=0, le=MAX_EPOCHS)
    max_steps: int | None = Field(default=None, gt=0, le=MAX_COUNT, description="Stop after N optimizer steps.")
    max_samples: int | None = Field(
        default=None, gt=0, le=MAX_COUNT, description="Stop after N records, epochs counted."
    )
    batch_size: int = Field(gt=0, le=MAX_BATCH, description="Records (images) an optimizer step, over all processes.")
    micro_batch_size: int | None = Field(
        default=None, gt=0, le=MAX_BATCH, description="Records a forward pass; batch_size if unset."
    )
    packing: PackingSpec | None = Field(
        default=None, description="Micro-batches of rows without padding, in place of micro_batch_size."
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
    checkpoint_language_model: bool = Field(
        default=False,
        description="The language model computes the inside of its layers again in the backward pass, all but "
        "attention, instead of keeping it: less memory, more time, the same gradients.",
    )
    sharding: Literal["auto", "none", "full"] = Field(
        default="auto",
        description="none: every process holds the whole model. full: each holds a part of every tensor, and all of a "
        "layer only while it computes it. auto: full where the whole would take more than half of a process's memory.",
    )
    torch_compile: bool = Field(
        default=False,
        description="On a GPU, torch compiles the language model's layers, one by one: faster steps after a minute or "
        "more of compiling, with results equal to rounding. On a CPU it is left out.",
    )
    keep_features: bool = Field(
        default=False,
        description="Encoders that do not train see each image by itself, so that their features may be kept on disk "
        "and read again, in this stage and others. Against false, last bits may differ with some encoders.",
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

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``draw`` where there is none, so that digests of published recipes stay."""
        tree: dict[str, Any] = handler(self)
        if tree.get("draw") is None:
            tree.pop("draw", None)
        return tree

    @property
    def quantized(self) -> bool:
        """Whether the layers that have adapters are held in 4 bits, whole in each process."""
        return self.lora is not None and self.lora.quantize is not None

    def shards(
        self, *, processes: int, parameters: int, trained: int, frozen_matrices: int, memory_bytes: float
    ) -> bool:
        """Whether each process holds a part of the model alone.

        Args:
            processes: How many train.
            parameters: Of the stage's model.
            trained: Those of them that train.
            frozen_matrices: Those that do not and that bf16 is computed with.
            memory_bytes: Of the device of one process.
        """
        if self.quantized:
            return False
        if self.sharding == "auto":
            # Weights; in bf16, copies of them or these alone; gradients and two moments.
            each = 6 * parameters - 4 * frozen_matrices if self.precision == "bf16" else 4 * parameters
            whole = each + 12 * trained
            return processes > 1 and whole > memory_bytes / 2
        return processes > 1 and self.sharding == "full"

    @model_validator(mode="after")
    def _four_bits_are_held_whole(self) -> StageSpec:
        if self.quantized and self.sharding == "full":
            raise ValueError(
                "lora.quantize is nf4 and sharding is full; each process holds what is in 4 bits whole: set sharding "
                "to auto, or quantize to null"
            )
        return self

    @model_validator(mode="after")
    def _packing_makes_the_micro_batches(self) -> StageSpec:
        if self.packing is not None and self.micro_batch_size is not None:
            raise ValueError(
                f"packing fills micro-batches by tokens and images, and micro_batch_size says {self.micro_batch_size} "
                "records; set micro_batch_size to null, or leave packing out"
            )
        return self

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


Tiles = Annotated[int, Field(ge=1, le=64)]
Channel = Annotated[int, Field(ge=0, le=255)]


class EncoderSpec(Strict):
    """One vision encoder of the model."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="Its name inside this model; keys of pixel tensors.")
    encoder: str = Field(description="A row of ENCODERS.")
    source: str = Field(default="scratch:", description="hub:, dir:, snapshot:, package: or scratch:.")
    image_size: int | None = Field(
        default=None, gt=0, le=MAX_PIXELS, description="Pixels a side; the row's own when left out."
    )
    fill: tuple[Channel, Channel, Channel] | None = Field(
        default=None,
        description="Colour around an image that is padded to a square, RGB, 0 to 255; the row's own when left out: "
        "the mean colour, unless it says otherwise.",
    )
    fit: Literal["stretch", "crop", "pad"] | None = Field(
        default=None, description="What happens to an image that is not square; the row's own when left out: pad."
    )
    small: bool = Field(
        default=False,
        description="The row's small size: the same code with fewer and narrower blocks, at its small image size, from "
        "fresh weights.",
    )

    @model_validator(mode="after")
    def _small_has_no_weights(self) -> EncoderSpec:
        if self.small and self.source != "scratch:":
            raise ValueError(
                f'small encoder "{self.name}" has source {self.source}; a small size has no weights: scratch:'
            )
        return self


class FusionSpec(Strict):
    """How several encoders' features become one set of visual tokens."""

    strategy: str = Field(default="channel-concat", description="A row of FUSIONS.")
    grid: int = Field(gt=0, le=1_024, description="Side of the visual token grid.")
    options: dict[str, Any] = Field(default={}, description="The strategy's own options: manyeyes fusions.")


class ProjectorSpec(Strict):
    """From fused features to the language model's width."""

    kind: Literal["linear", "mlp", "identity", "pixel-unshuffle", "resampler", "c-abstractor"] = "mlp"
    depth: int = Field(default=2, ge=1, le=64, description="Linear layers of an mlp, GELU between them.")
    options: dict[str, Any] = Field(default={}, description="The kind's own options.")


class ReinjectionSpec(Strict):
    """Lets the language model look at the image again: after layer start + k * stride, for k below count.

    Needs the fusion spatial-vision-aggregator, whose windows it looks at.
    """

    start: int = Field(
        default=0, ge=0, le=10_000, description="First decoder layer, from 0, after whose output it looks."
    )
    stride: int = Field(ge=1, le=10_000, description="Layers from one look to the next.")
    count: int | None = Field(default=None, ge=1, le=10_000, description="How often; as many as fit when left out.")


class LayoutSpec(Strict):
    """How an image becomes tiles, and its tokens a sequence."""

    tiling: Literal["none", "anyres", "grid"] = Field(
        default="none",
        description="none: one tile. anyres: the whole image, then tiles of the grid that suits it best (LLaVA-1.6). "
        "grid: the whole image, then image_grid x image_grid tiles (Mini-Gemini HD).",
    )
    pinpoints: tuple[tuple[Tiles, Tiles], ...] = Field(
        default=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
        min_length=1,
        description="Columns and rows of the grids that anyres chooses from.",
    )
    image_grid: int = Field(default=2, ge=2, le=64, description="Tiles a side, for grid.")
    newline: bool = Field(default=False, description="A learned token ends each row of visual tokens.")
    newline_at: Literal["rows", "end"] = Field(
        default="rows",
        description="rows: as newline says. end: one newline after an image's last token and none before, as LLaVA-1.6 "
        "does where an image is a single tile.",
    )
    unpad: bool = Field(default=False, description="Rows and columns that show nothing but padding are left out.")
    whole: tuple[str, ...] = Field(
        default=(), description="Encoders, by name, that see the whole image once, whatever the tiling."
    )

    @model_validator(mode="after")
    def _fits(self) -> LayoutSpec:
        if self.tiling == "grid" and (self.newline or self.unpad):
            raise ValueError("grid puts one tile's tokens after another's: it has no rows for newline or unpad")
        if self.whole and self.tiling != "grid":
            raise ValueError("whole belongs to tiling grid")
        if self.newline_at == "end" and (not self.newline or self.unpad or self.tiling != "none"):
            raise ValueError("newline_at end belongs to newline true, unpad false and tiling none")
        return self


class SharedSpec(Strict):
    """One input for all encoders; the defaults are Eagle's (arXiv:2408.15998).

    The image is resized and normalised once; the tensor is then interpolated (bilinear, in fp32) to every encoder's
    size.
    """

    image_size: int | None = Field(
        default=None,
        gt=0,
        le=MAX_PIXELS,
        description="Pixels a side; what the encoder that needs most takes when left out.",
    )
    base: str | None = Field(
        default=None,
        description="The encoder, by name, with whose mean, standard deviation, filter, fit and fill it is made; the "
        "first when left out.",
    )
    align_corners: bool = Field(default=True, description="Corner pixels keep the place of their centres.")
    antialias: bool = Field(
        default=False, description="Widen the filter when shrinking; only with align_corners false."
    )

    @model_validator(mode="after")
    def _is_one_filter(self) -> SharedSpec:
        if self.align_corners and self.antialias:
            # Seen with torch 2.14 and onnxruntime 1.31: up to 1.0 apart on normalised noise.
            raise ValueError(
                "antialias needs align_corners false: torch and ONNX Runtime place an antialiased filter with aligned "
                "corners differently, and no published model has it"
            )
        return self


class LanguageModelSpec(Strict):
    """Any Hugging Face causal language model."""

    source: str
    max_length: int = Field(default=2048, gt=0, le=2**24, description="Tokens, image tokens included.")


class ChatSpec(Strict):
    """How turns become text."""

    template: str = Field(
        default="vicuna_v1", description="A row of CHAT_TEMPLATES, or tokenizer for the tokenizer's own."
    )
    system: str | None = Field(default=None, description="Replaces the template's own system text.")


class ModelSpec(Strict):
    """What the model is."""

    encoders: tuple[EncoderSpec, ...] = Field(min_length=1)
    preprocess: Literal["independent", "shared"] = Field(
        default="independent",
        description="independent: the uint8 image is resized for each encoder. shared: one tensor, as shared says.",
    )
    shared: SharedSpec | None = Field(default=None, description="For preprocess shared; Eagle's when left out.")
    fusion: FusionSpec
    projector: ProjectorSpec = ProjectorSpec()
    reinjection: ReinjectionSpec | None = None
    layout: LayoutSpec | None = None
    language_model: LanguageModelSpec
    chat: ChatSpec = ChatSpec()

    @model_validator(mode="after")
    def _names_differ(self) -> ModelSpec:
        names = [encoder.name for encoder in self.encoders]
        if len(set(names)) != len(names):
            raise ValueError(f"encoder names must differ, found {names}")
        return self

    @model_validator(mode="after")
    def _sharing_is_sound(self) -> ModelSpec:
        names = [encoder.name for encoder in self.encoders]
        if self.preprocess == "independent":
            if self.shared is not None:
                raise ValueError("shared belongs to preprocess shared")
            return self
        if "shared" in names:
            raise ValueError('with preprocess shared no encoder may have the name "shared"')
        base = self.shared.base if self.shared else None
        if base is not None and base not in names:
            raise ValueError(f'shared.base names "{base}"; the encoders are {names}. {did_you_mean(base, names)}')
        return self
