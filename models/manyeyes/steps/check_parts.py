"""Refuses a recipe whose parts do not exist, or do not fit together, before any machine time is spent."""

from __future__ import annotations

from manyeyes.recipe import ModelSpec
from manyeyes.runtime.templates import TOKENIZER_TEMPLATE, get_chat_template


def check_parts(model: ModelSpec) -> None:
    """Check the names and options of encoders, fusion, projector and chat template, and grids against each other.

    Encoders and fusion are built without memory, on the meta device. Widths that depend on the language model are left
    to the stage that loads it.

    Raises:
        RecipeError: No such encoder, fusion, projector, template or option (names the nearest), or too few encoders.
        ShapeError: An image size that an encoder cannot take, or grids that the fusion cannot align.
        SourceError: A package that an encoder is built with is not installed.
    """
    from manyeyes.encoders import build_encoder, encoder_row
    from manyeyes.encoders.skeleton import meta_device
    from manyeyes.fusion import build_fusion, fusion_row
    from manyeyes.model.projector import check_projector_options

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
