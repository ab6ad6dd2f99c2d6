"""What a published system must say about itself to be converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manyeyes.converters.encoder_sources import EncoderSources
from manyeyes.converters.source import OriginalCheckpoint
from manyeyes.converters.tables import KeyTable
from manyeyes.model.configuration import SharedPixelsConfig
from manyeyes.recipe import FusionSpec, ProjectorSpec, ReinjectionSpec
from manyeyes.runtime.preprocess import ImageTransform
from manyeyes.runtime.tiling import TokenLayout


@dataclass(frozen=True)
class EncoderPlan:
    """One encoder of a published checkpoint.

    Attributes:
        name: Its name inside our model: keys ``encoders.<name>.net.*``, pixels ``pixel_values.<name>``.
        row: Row of ENCODERS that it is, at any size.
        image_size: Pixels a side.
        architecture: Replaces parts of the row's own architecture; empty for the true size.
        transform: How it wants its pixels; not used with ``Plan.shared_pixels``.
        weights: File or folder with its published weights, which then are read through its family; None when they are
            in the checkpoint and ``Plan.keys`` has rules for them.
    """

    name: str
    row: str
    image_size: int
    transform: ImageTransform
    architecture: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A published checkpoint as our model.

    Attributes:
        text_config: ``config.json`` of the language model, with ``model_type``.
        encoders: In the order of their channels.
        fusion: As in a recipe.
        projector: As in a recipe.
        keys: Rules for every tensor of ours that no encoder brings along, and for every stored key.
        template: Row of CHAT_TEMPLATES.
        reinjection: As in a recipe; None where the language model does not look back.
        layout: How an image becomes tiles; None for one tile.
        shared_pixels: What every encoder's input is made from; None where each has its own.
        shared_transform: With ``shared_pixels``: how the one tensor is made.
        processor_layout: The processor's layout where it differs from ``layout``; None where it does not.
        image_marks: Text before and after each image, such as ``<im_start>`` and ``<im_end>``.
        new_tokens: Tokens that the published loader adds to the tokenizer, in order, where it lacks them.
        max_length: Tokens that a conversation may have.
    """

    text_config: Mapping[str, Any]
    encoders: tuple[EncoderPlan, ...]
    fusion: FusionSpec
    projector: ProjectorSpec
    keys: KeyTable
    template: str
    reinjection: ReinjectionSpec | None = None
    layout: TokenLayout | None = None
    shared_pixels: SharedPixelsConfig | None = None
    shared_transform: ImageTransform | None = None
    processor_layout: TokenLayout | None = None
    image_marks: tuple[str, str] = ("", "")
    new_tokens: tuple[str, ...] = ()
    max_length: int = 2048


@dataclass(frozen=True)
class System:
    """One published layout.

    Attributes:
        name: As the report says it.
        recognises: Whether a ``config.json`` is of this system, by its fields; never by the name of a path.
        plan: Reads configurations and the shapes of tensors, no tensor itself. Raises ``CheckpointError`` for what our
            model cannot do, ``SourceError`` for an encoder that cannot be had.
        describes: What ``recognises`` looks for, in words; the message about an unknown system lists it.
    """

    name: str
    recognises: Callable[[Mapping[str, Any]], bool]
    plan: Callable[[OriginalCheckpoint, EncoderSources], Plan]
    describes: str
