"""What the model is, as Hugging Face saves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from manyeyes.recipe import FusionSpec, ProjectorSpec, ReinjectionSpec
from manyeyes.runtime.tiling import TokenLayout
from manyeyes.strict import StrictModel

_Part = TypeVar("_Part", bound=BaseModel)

MAKES_NO_SENSE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers and torch raise for values of a wrong type, or out of range, in a ``config.json``."""


class EncoderConfig(StrictModel):
    """One vision encoder of a model.

    Attributes:
        name: Its name inside the model; keys of pixel tensors.
        encoder: A row of ENCODERS.
        image_size: Pixels a side that it takes.
        small: The row's small size.
        architecture: In a converted checkpoint: what replaces parts of the row's own architecture.
    """

    name: str
    encoder: str
    image_size: int
    small: bool
    architecture: dict[str, Any] | None = None


class SharedPixelsConfig(StrictModel):
    """The one normalised tensor that every encoder's input is made from.

    Attributes:
        image_size: Pixels a side of that tensor.
        align_corners: Corner pixels keep the place of their centres.
        antialias: Widen the filter when shrinking.
    """

    image_size: int
    align_corners: bool
    antialias: bool


class ManyEyesConfig(PreTrainedConfig):
    """What the model is.

    Each part is also taken as the plain values that ``config.json`` has; fields of a part that we do not know are left
    out, as transformers does with those of the whole.

    Attributes:
        text_config: The language model's own configuration.
        encoders: In the order of their channels.
        fusion: As in the recipe.
        projector: As in the recipe.
        reinjection: As in the recipe; None when the language model does not look back.
        layout: How an image becomes tiles and its tokens a sequence; None for one tile, its tokens as they are.
        shared_pixels: What every encoder's input is made from; None where each has its own.
        image_token_id: Id that stands where visual tokens go.
    """

    model_type = "manyeyes"
    sub_configs_defaults: ClassVar = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    text_config: PreTrainedConfig
    encoders: tuple[EncoderConfig, ...]
    fusion: FusionSpec
    projector: ProjectorSpec
    reinjection: ReinjectionSpec | None = None
    layout: TokenLayout | None = None
    shared_pixels: SharedPixelsConfig | None = None
    image_token_id: int = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.encoders = tuple(_read(EncoderConfig, encoder) for encoder in self.encoders)
        self.fusion = _read(FusionSpec, self.fusion)
        self.projector = _read(ProjectorSpec, self.projector)
        if self.reinjection is not None:
            self.reinjection = _read(ReinjectionSpec, self.reinjection)
        if self.layout is not None and not isinstance(self.layout, TokenLayout):
            self.layout = TokenLayout.from_dict(self.layout)
        if self.shared_pixels is not None:
            self.shared_pixels = _read(SharedPixelsConfig, self.shared_pixels)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``config.json`` has them."""
        values: dict[str, Any] = super().to_dict()
        values["encoders"] = [encoder.model_dump(exclude_none=True) for encoder in self.encoders]
        for name in ("fusion", "projector", "reinjection", "shared_pixels"):
            part = getattr(self, name)
            values[name] = None if part is None else part.model_dump()
        values["layout"] = None if self.layout is None else self.layout.as_dict()
        return values


def _read(part: type[_Part], values: Any) -> _Part:
    if isinstance(values, Mapping):
        values = {name: value for name, value in values.items() if name in part.model_fields}
    return part.model_validate(values)
