"""What the model is, as Hugging Face saves it."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec


class ManyEyesConfig(PreTrainedConfig):
    """What the model is.

    Attributes:
        text_config: The language model's own configuration.
        encoders: Per encoder ``name``, ``encoder`` (row of ENCODERS), ``image_size`` and ``small``; in a converted
            checkpoint also ``architecture``, which replaces parts of the row's own.
        fusion: ``strategy`` (row of FUSIONS), ``grid`` and ``options``.
        projector: ``kind``, ``depth`` and ``options``.
        reinjection: ``start``, ``stride`` and ``count``; None when the language model does not look back.
        layout: How an image becomes tiles and its tokens a sequence; None for one tile, its tokens as they are.
        shared_pixels: ``image_size``, ``align_corners`` and ``antialias`` of the one tensor that every encoder's input
            is made from; None where each has its own.
        image_token_id: Id that stands where visual tokens go.
    """

    model_type = "manyeyes"
    sub_configs_defaults: ClassVar = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    # None only where transformers makes an empty configuration to learn the defaults.
    text_config: Any = None
    encoders: Any = None
    fusion: Any = None
    projector: Any = None
    reinjection: Any = None
    layout: Any = None
    shared_pixels: Any = None
    image_token_id: int = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
