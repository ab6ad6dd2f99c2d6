"""What a recipe says of the model, as the configuration and the processor have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from manyeyes.encoders import build_encoder, encoder_row, encoder_transform
from manyeyes.encoders.weights import meta_device
from manyeyes.errors import RecipeError, did_you_mean
from manyeyes.fusion import build_fusion, fusion_row
from manyeyes.model.configuration import EncoderConfig, ManyEyesConfig, SharedPixelsConfig
from manyeyes.model.modeling import ManyEyesForConditionalGeneration
from manyeyes.model.projector import check_projector_options
from manyeyes.processor import SHARED, ManyEyesProcessor
from manyeyes.recipe import EncoderSpec, FusionSpec, LayoutSpec, ModelSpec, SharedSpec
from manyeyes.runtime.preprocess import ImageTransform
from manyeyes.runtime.templates import TOKENIZER_TEMPLATE, get_chat_template
from manyeyes.runtime.tiling import TokenLayout


def configure(
    spec: ModelSpec, chosen: Sequence[EncoderSpec], *, text_config: PreTrainedConfig, image_token_id: int
) -> ManyEyesConfig:
    """The configuration of a model with the chosen encoders of a recipe.

    Args:
        spec: What the model is.
        chosen: From ``choose_encoders``.
        text_config: The language model's.
        image_token_id: Stands for an image in a sequence.

    Raises:
        RecipeError: ``spec`` names something that there is not.
    """
    return ManyEyesConfig(
        text_config=text_config,
        encoders=tuple(_encoder(entry) for entry in chosen),
        fusion=_fusion(spec, chosen),
        projector=spec.projector,
        reinjection=spec.reinjection if len(chosen) == len(spec.encoders) else None,
        layout=_layout(spec, chosen),
        shared_pixels=_shared_pixels(spec),
        image_token_id=image_token_id,
    )


def make_processor(
    spec: ModelSpec,
    chosen: Sequence[EncoderSpec],
    model: ManyEyesForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
) -> ManyEyesProcessor:
    """The processor of a model that ``configure`` described; arguments as there."""
    return ManyEyesProcessor(
        tokenizer,
        transforms={name: transform.as_dict() for name, transform in image_transforms(spec, chosen).items()},
        template=spec.chat.template,
        system=spec.chat.system,
        num_image_tokens=model.num_image_tokens,
        image_token_id=model.config.image_token_id,
        max_length=spec.language_model.max_length,
        layout=_processor_layout(model.config),
        sends_image_sizes=model.fusion.uses_image_sizes,
    )


def choose_encoders(spec: ModelSpec, names: Sequence[str] | None) -> list[EncoderSpec]:
    """A recipe's encoders by name, in its order; all for ``None``.

    Raises:
        RecipeError: The recipe has no such encoder.
    """
    known = [entry.name for entry in spec.encoders]
    for name in names or ():
        if name not in known:
            raise RecipeError(
                f'encoder is "{name}"', f"the recipe has {', '.join(known)}", did_you_mean(name, known) or "Name one."
            )
    return [entry for entry in spec.encoders if names is None or entry.name in names]


def _layout(spec: ModelSpec, chosen: Sequence[EncoderSpec]) -> TokenLayout | None:
    if spec.layout is None or len(chosen) < len(spec.encoders):
        return None
    names = [entry.name for entry in chosen]
    for name in spec.layout.whole:
        if name not in names:
            raise RecipeError(
                f'model.layout.whole names "{name}"',
                f"the encoders are {', '.join(names)}",
                f"{did_you_mean(name, names)}Fix it.",
            )
    tiled = [entry for entry in chosen if entry.name not in spec.layout.whole]
    if not tiled:
        raise RecipeError("model.layout.whole names every encoder", "one must see tiles", "Leave the first one out.")
    size = _shared_size(spec) if spec.preprocess == "shared" else _encoder_size(tiled[0])
    return TokenLayout(**spec.layout.model_dump(), tile_size=size)


def _fusion(spec: ModelSpec, chosen: Sequence[EncoderSpec]) -> FusionSpec:
    if len(chosen) == len(spec.encoders):
        return spec.fusion
    # Prealign: one encoder has nothing to be fused with; the joint fusion starts after it.
    return FusionSpec(strategy="channel-concat", grid=spec.fusion.grid)


def _encoder(entry: EncoderSpec) -> EncoderConfig:
    return EncoderConfig(name=entry.name, encoder=entry.encoder, image_size=_encoder_size(entry), small=entry.small)


def _encoder_size(entry: EncoderSpec) -> int:
    row = encoder_row(entry.encoder)
    default = row.small_image_size if entry.small else None
    return entry.image_size or default or row.image_size


def _shared_size(spec: ModelSpec) -> int:
    if spec.shared is not None and spec.shared.image_size is not None:
        return spec.shared.image_size
    layout = spec.layout or LayoutSpec()
    # A fixed grid of tiles is cut from the whole image, which then has to be this many times as large.
    grid = layout.image_grid if layout.tiling == "grid" else 1
    return max(_encoder_size(entry) * (1 if entry.name in layout.whole else grid) for entry in spec.encoders)


def _shared_pixels(spec: ModelSpec) -> SharedPixelsConfig | None:
    if spec.preprocess != "shared":
        return None
    shared = spec.shared or SharedSpec()
    return SharedPixelsConfig(
        image_size=_shared_size(spec), align_corners=shared.align_corners, antialias=shared.antialias
    )


def image_transforms(spec: ModelSpec, chosen: Sequence[EncoderSpec]) -> dict[str, ImageTransform]:
    """How a model with the chosen encoders of a recipe wants its pixels, by encoder; or ``shared`` alone."""
    if spec.preprocess != "shared":
        return {entry.name: _transform(entry, _encoder_size(entry)) for entry in chosen}
    # An encoder that is prealigned alone sees the pixels that it will see in company.
    name = (spec.shared or SharedSpec()).base or spec.encoders[0].name
    base = next(entry for entry in spec.encoders if entry.name == name)
    return {SHARED: _transform(base, _shared_size(spec))}


def _transform(entry: EncoderSpec, size: int) -> ImageTransform:
    transform = encoder_transform(entry.encoder, image_size=size, fill=entry.fill)
    return transform if entry.fit is None else replace(transform, fit=entry.fit)


def _processor_layout(config: ManyEyesConfig) -> dict[str, Any] | None:
    layout = config.layout
    if layout is not None and layout.tiling == "grid" and config.shared_pixels is not None:
        # The model cuts the tiles of a fixed grid itself, from the one tensor that shows the whole image.
        layout = replace(layout, whole=(SHARED,))
    return None if layout is None else layout.as_dict()


def check_parts(model: ModelSpec) -> None:
    """Check the names and options of encoders, fusion, projector and chat template, and grids against each other.

    Encoders and fusion are built without memory, on the meta device. Widths that depend on the language model are left
    to the stage that loads it.

    Raises:
        RecipeError: No such encoder, fusion, projector, template or option (names the nearest), or too few encoders.
        ShapeError: An image size that an encoder cannot take, or grids that the fusion cannot align.
        SourceError: A package that an encoder is built with is not installed.
    """
    if model.chat.template != TOKENIZER_TEMPLATE:
        get_chat_template(model.chat.template)
    # What costs nothing comes first.
    fusion_row(model.fusion.strategy).check_options(dict(model.fusion.options))
    check_projector_options(model.projector.kind, dict(model.projector.options))
    for entry in model.encoders:
        encoder_row(entry.encoder)
    with meta_device():
        encoders = [
            build_encoder(entry.encoder, image_size=entry.image_size, small=entry.small) for entry in model.encoders
        ]
        build_fusion(
            model.fusion.strategy,
            encoder_channels=[encoder.channels for encoder in encoders],
            grid=model.fusion.grid,
            encoder_grids=[encoder.grid for encoder in encoders],
            options=model.fusion.options,
        )
