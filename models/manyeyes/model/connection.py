"""What stands between encoders and language model: fusion, projector, and the looks back from inside the model.

Shapes: I images, N visual tokens an image, D width of the language model, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manyeyes.errors import RecipeError, ShapeError
from manyeyes.fusion import Fusion, SpatialVisionAggregator, build_fusion
from manyeyes.fusion.cross_attention import VisualWindows
from manyeyes.fusion.patch_info_mining import PatchInfoMining
from manyeyes.model.projector import AnyProjector, build_projector
from manyeyes.model.reinjection import Reinjection, VisualContext, reinjected_layers
from manyeyes.recipe import FusionSpec, ProjectorSpec, ReinjectionSpec
from manyeyes.runtime.tiling import NEWLINE, TokenLayout


@dataclass(frozen=True)
class VisualTokens:
    """Visual tokens that a language model can look behind.

    Attributes:
        tokens: ``[I, N, D]``.
        windows: Windows of all tokens of all images.
        cells: ``[I, N]``, each token's place in ``windows``; -1 for a newline.
    """

    tokens: Tensor
    windows: VisualWindows
    cells: Tensor

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.tokens.device

    def __getitem__(self, images: Tensor) -> VisualTokens:
        """Tokens of some images, in that order and as often as named, as a tensor of tokens would give them."""
        return VisualTokens(tokens=self.tokens[images], windows=self.windows, cells=self.cells[images])


@dataclass(frozen=True)
class Connection:
    """The parts between encoders and language model.

    Attributes:
        fusion: Several encoders' maps to one set of tokens.
        projector: Tokens to the width of the language model.
        reinjection: Blocks between the layers of the language model, not attached yet; None without them.
        newline: ``[D]``, the learned token that ends a row; None without newlines.
    """

    fusion: Fusion
    projector: AnyProjector
    reinjection: Reinjection | None
    newline: nn.Parameter | None


def build_connection(
    *,
    encoder_channels: Sequence[int],
    encoder_grids: Sequence[int],
    hidden_size: int,
    num_layers: int,
    fusion: FusionSpec,
    projector: ProjectorSpec,
    reinjection: ReinjectionSpec | None = None,
    layout: TokenLayout | None = None,
) -> Connection:
    """Make fusion, projector and reinjection, freshly initialised from torch's global generator.

    Args:
        encoder_channels: Channels of each encoder's map, in recipe order.
        encoder_grids: Side of each encoder's map, in cells.
        hidden_size: Width of the language model.
        num_layers: Its layers.
        fusion: Which, its grid and its options.
        projector: Which, its depth and its options.
        reinjection: After which layers the language model looks back; None for none.
        layout: How an image becomes tiles and its tokens a sequence; None for the tokens as they are.

    Raises:
        RecipeError: An unknown name or option, or parts that cannot be combined.
        ShapeError: Grids or widths that do not fit together.
    """
    fused = build_fusion(
        fusion.strategy,
        encoder_channels=encoder_channels,
        grid=fusion.grid,
        encoder_grids=encoder_grids,
        options=fusion.options,
    )
    projected = build_projector(
        projector.kind,
        depth=projector.depth,
        in_channels=fused.channels,
        out_channels=hidden_size,
        grid=fusion.grid,
        options=projector.options,
    )
    injected = None
    if reinjection is not None:
        if not isinstance(fused, SpatialVisionAggregator):
            raise RecipeError(
                f'model.reinjection with the fusion "{fusion.strategy}"',
                "it looks at the windows of spatial-vision-aggregator",
                "Use that fusion, or drop model.reinjection.",
            )
        if projected.token_grid(fused.grid) != fused.grid:
            raise RecipeError(
                f'model.reinjection with the projector "{projector.kind}"',
                "each visual token must keep its cell of the grid",
                "Use mlp, linear or identity.",
            )
        injected = Reinjection(
            hidden_size,
            layers=reinjected_layers(reinjection, num_layers=num_layers),
            channels=fused.context_channels,
            windows=fused.windows,
            num_heads=fused.num_heads,
        )
    if layout is not None:
        _check_layout(layout, fused, projected)
    newline = None
    if layout is not None and layout.newline:
        # LLaVA-1.6 and Cambrian-1 both start from a normal distribution of this width.
        newline = nn.Parameter(torch.randn(hidden_size) / hidden_size**0.5)
    return Connection(fusion=fused, projector=projected, reinjection=injected, newline=newline)


def _check_layout(layout: TokenLayout, fusion: Fusion, projector: AnyProjector) -> None:
    grid = projector.token_grid(fusion.grid)
    tokens = projector.num_tokens(fusion.num_tokens)
    if grid is None or tokens != grid * grid:
        raise RecipeError(
            f"model.layout with {tokens} visual tokens an image that make no one square grid",
            "tiles, newlines and unpadding need one grid of tokens",
            "Use another fusion than sequence-append and another projector than resampler.",
        )
    image_grid = fusion.image_grid if isinstance(fusion, PatchInfoMining) else 1
    if (image_grid > 1 or layout.whole) and (layout.tiling != "grid" or image_grid != layout.image_grid):
        raise RecipeError(
            f"model.layout has tiling {layout.tiling} of {layout.image_grid}, with encoders that see the whole image: "
            f"{', '.join(layout.whole) or 'none'}; model.fusion.options.image_grid is {image_grid}",
            "whole maps are cut by patch-info-mining, into as many parts as there are tiles",
            "Use that fusion and give both the same image_grid.",
        )
    if fusion.uses_image_sizes and layout.tiling != "none":
        raise RecipeError(
            f"model.layout.tiling is {layout.tiling} and model.fusion.options.mask_padding is true",
            "padding is masked in whole images, not in tiles",
            "Set one of them to none or false.",
        )


def make_visual_tokens(
    features: Sequence[Tensor],
    connection: Connection,
    *,
    image_sizes: Tensor | None = None,
    layout: Tensor | None = None,
) -> Tensor | VisualTokens:
    """From feature maps to visual tokens.

    Args:
        features: One ``[I, C_k, h_k, w_k]`` map per encoder; with tiles one map a tile.
        connection: The parts to run.
        image_sizes: ``[I, 2]``, width and height of each image before padding, where the fusion masks padding.
        layout: ``[I, M]``: which token of all tiles' tokens stands at each place of an image, counted over the whole
            batch; -1 for a newline. Rows shorter than M end with anything. None leaves the tokens as they are.

    Returns:
        ``[I, N, D]`` visual tokens; with reinjection together with what they can look at.

    Raises:
        ShapeError: A layout with newlines for a model that has none.
    """
    fusion, windows = connection.fusion, None
    if connection.reinjection is not None:
        assert isinstance(fusion, SpatialVisionAggregator)
        projected = fusion.project(features, image_sizes)
        windows = fusion.look(projected)
        fused = fusion.aggregate(projected)
    else:
        fused = fusion(features, image_sizes)
    tokens: Tensor = connection.projector(fused)
    cells = torch.arange(tokens.shape[0] * tokens.shape[1], device=tokens.device).view(tokens.shape[:2])
    if layout is not None:
        newline = connection.newline
        # The exporter cannot look into a tensor; in a bundle the layout comes from the recipe that the newline is from.
        if newline is None and not torch.compiler.is_exporting() and bool((layout == NEWLINE).any()):
            raise ShapeError("a layout with newlines", "this model has no newline token", "Set model.layout.newline.")
        flat = tokens.flatten(0, 1)
        # The newline is the last row, which is where -1 points.
        table = flat if newline is None else torch.cat([flat, newline.to(flat.dtype)[None]])
        tokens, cells = table[layout], layout
    return tokens if windows is None else VisualTokens(tokens=tokens, windows=windows, cells=cells)


def place_visual_tokens(
    embeds_BTD: Tensor, visual_tokens: Tensor | VisualTokens | None, image_spans: Tensor | None
) -> Tensor:
    """Token embeddings with visual tokens in their places.

    Args:
        embeds_BTD: Embeddings of the text; anything at image spans.
        visual_tokens: ``[I, N, D]``.
        image_spans: ``[S, 4]``: row, start and length in tokens, and image; an image may stand in several rows.

    Raises:
        ShapeError: Spans without visual tokens or the reverse, or a span longer than N.
    """
    if visual_tokens is not None and image_spans is None:
        raise ShapeError("images without image_spans", "spans say where they go", "Pass both, or neither.")
    if image_spans is None or image_spans.shape[0] == 0:
        return embeds_BTD
    if visual_tokens is None:
        raise ShapeError("image_spans without images", "pixels or visual tokens are needed", "Pass both, or neither.")
    if isinstance(visual_tokens, VisualTokens):
        visual_tokens = visual_tokens.tokens
    places, wanted, image = span_places(image_spans, num_tokens=visual_tokens.shape[1], width=embeds_BTD.shape[1])
    values = visual_tokens[image][wanted].to(embeds_BTD.dtype)
    return embeds_BTD.flatten(0, 1).index_put((places,), values).view_as(embeds_BTD)


def window_index(visual: VisualTokens, image_spans: Tensor, *, rows: int, width: int) -> Tensor:
    """Which window each position of a batch looks at.

    Args:
        visual: Visual tokens of the batch's images.
        image_spans: ``[S, 4]``: row, start and length in tokens, and image.
        rows: B.
        width: T.

    Returns:
        ``[B, T]``, places in ``visual.windows``; -1 for text and newlines.
    """
    places, wanted, image = span_places(image_spans, num_tokens=visual.tokens.shape[1], width=width)
    index = torch.full((rows * width,), NEWLINE, dtype=torch.long, device=visual.cells.device)
    return index.index_put((places,), visual.cells[image][wanted]).view(rows, width)


def span_places(image_spans: Tensor, *, num_tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the tokens of image spans stand.

    Args:
        image_spans: ``[S, 4]``: row, start and length in tokens, and image.
        num_tokens: Visual tokens that an image has at most.
        width: T.

    Returns:
        Places ``row * T + position`` of all spans' tokens, ``[M]``; which of ``[S, num_tokens]`` those are; and the
        image of each span, ``[S]``.

    Raises:
        ShapeError: A span is longer than ``num_tokens``.
    """
    row, start, length, image = image_spans.unbind(1)
    if bool((length > num_tokens).any()):
        raise ShapeError(
            f"image spans of up to {int(length.max())} tokens", f"images have {num_tokens}", "Make the batch anew."
        )
    offsets = torch.arange(num_tokens, device=image_spans.device)
    wanted = offsets < length[:, None]
    return ((row * width + start)[:, None] + offsets)[wanted], wanted, image


def visual_context(windows: VisualWindows | None, index: Tensor | None) -> VisualContext | None:
    """What one call of the decoder may look at; None when no position looks at anything.

    Args:
        windows: Windows of all visual tokens.
        index: ``[B, T]``, each position's window; -1 for none.
    """
    if windows is None or index is None:
        return None
    flat = index.flatten()
    places = (flat >= 0).nonzero().squeeze(1)
    if places.shape[0] == 0:
        return None
    return VisualContext(places=places, windows=windows.select(flat[places]))
