"""One training sample on the meta device: what it computes and what it keeps for its backward pass.

The real model runs, forward and backward, at its true sizes and with the real frozen and trained groups, on tensors
that have a shape and no memory. Floating-point operations are counted by ``torch.utils.flop_counter``; kept tensors by
``torch.autograd.graph.saved_tensors_hooks``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from manyeyes.connection import VisualTokens
from manyeyes.language_model import compute_logits, decoder_of
from manyeyes.model import ManyEyesForConditionalGeneration
from manyeyes.processor import SHARED
from manyeyes.reinjection import VISUAL_CONTEXT, VisualContext
from manyeyes.runtime.tiling import TokenLayout, arrange_tokens

_META = torch.device("meta")


@dataclass(frozen=True)
class ImageShape:
    """What one image becomes; of all images that a layout admits, one with the most tokens.

    Attributes:
        tiles: Tiles of an encoder that sees tiles.
        tokens: Visual tokens in the sequence, newlines included.
        newlines: How many of them are newlines.
    """

    tiles: int
    tokens: int
    newlines: int


@dataclass(frozen=True)
class Counts:
    """What one sample costs.

    Attributes:
        flops: Forward and backward; a multiplication and an addition count as two.
        saved_bytes: Bytes of distinct tensors kept for the backward pass in fp32, parameters and buffers left out.
    """

    flops: int
    saved_bytes: int


def image_shape(model: ManyEyesForConditionalGeneration) -> ImageShape:
    """Tiles and tokens of the largest image that the model's layout admits."""
    per_tile = model.num_image_tokens
    if model.config.layout is None:
        return ImageShape(tiles=1, tokens=per_tile, newlines=0)
    layout = TokenLayout.from_dict(model.config.layout)
    grid = math.isqrt(per_tile)
    side = layout.tile_size
    # An image as large as a grid of tiles is cut into that grid, and shows no padding.
    sizes = [(side, side), *((columns * side, rows * side) for columns, rows in layout.pinpoints)]
    arranged = [(arrange_tokens(*size, layout, grid=grid), layout.num_tiles(*size)) for size in sizes]
    places, tiles = max(arranged, key=lambda pair: len(pair[0]))
    return ImageShape(tiles=tiles, tokens=len(places), newlines=int((places < 0).sum()))


def count_sample(
    model: ManyEyesForConditionalGeneration, shape: ImageShape, *, text_tokens: int, longest_text: int, supervised: int
) -> Counts:
    """Run one image and its text through the model on the meta device, forward and backward.

    Args:
        model: On the meta device, its parameters frozen or not as the stage says.
        shape: What the image becomes.
        text_tokens: Tokens beside the visual ones, for the operations.
        longest_text: The same for the bytes.
        supervised: Tokens that reach the head, at most; the last ones.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            kept[key] = tensor
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks
    with _FusedKernels():
        with FlopCounterMode(display=False) as counter:
            # The images cost the same whatever stands beside them: they run once.
            with keeping(keep, lambda tensor: tensor):
                seen = model.encode_images(_pixels(model, shape), image_sizes=_image_sizes(model, shape))
            loss = _loss(model, seen, shape, text_tokens=text_tokens, supervised=min(text_tokens, supervised))
            if loss.requires_grad:
                loss.backward(retain_graph=True)
        with keeping(keep, lambda tensor: tensor):
            _loss(model, seen, shape, text_tokens=longest_text, supervised=min(longest_text, supervised))
    model.zero_grad(set_to_none=True)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return Counts(flops=int(counter.get_total_flops()), saved_bytes=saved)


def count_forward(model: ManyEyesForConditionalGeneration, shape: ImageShape, *, text_tokens: int) -> int:
    """Operations of one forward pass over one image and its text: what answering starts with.

    Args:
        model: On the meta device; its parameters are frozen.
        shape: What the image becomes.
        text_tokens: Tokens beside the visual ones; only the last one reaches the head.
    """
    # The counter asks each parameter that is passed on for its gradient function, which without gradients has none.
    model.requires_grad_(False)
    with torch.no_grad(), _FusedKernels(), FlopCounterMode(display=False) as counter:
        seen = model.encode_images(_pixels(model, shape), image_sizes=_image_sizes(model, shape))
        _loss(model, seen, shape, text_tokens=text_tokens, supervised=1)
    return int(counter.get_total_flops())


def _loss(
    model: ManyEyesForConditionalGeneration,
    seen: Tensor | VisualTokens,
    shape: ImageShape,
    *,
    text_tokens: int,
    supervised: int,
) -> Tensor:
    tokens = seen.tokens if isinstance(seen, VisualTokens) else seen
    image = tokens.flatten(0, 1)
    places = torch.zeros(shape.tokens, dtype=torch.long, device=_META)
    if model.config.layout is not None:
        newline = [] if model.newline is None else [model.newline.to(image.dtype)[None]]
        image = torch.cat([image, *newline])[places]
    text = model.get_input_embeddings()(torch.zeros(1, text_tokens, dtype=torch.long, device=_META))
    embeds = torch.cat([text[:, :1], image[None].to(text.dtype), text[:, 1:]], dim=1)
    length = embeds.shape[1]
    context: dict[str, Any] = {}
    if isinstance(seen, VisualTokens):
        cells = places[: shape.tokens - shape.newlines]
        context[VISUAL_CONTEXT] = VisualContext(places=cells, windows=seen.windows.select(cells))
    hidden = decoder_of(model.language_model)(
        inputs_embeds=embeds,
        # Four dimensions: transformers looks into a mask of two, and a tensor without memory cannot be looked into.
        attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool, device=_META),
        use_cache=False,
        **context,
    ).last_hidden_state
    logits = compute_logits(model.language_model, hidden[:, -supervised:]).float()
    targets = torch.zeros(supervised, dtype=torch.long, device=_META)
    return functional.cross_entropy(logits[0], targets, reduction="sum")


def _pixels(model: ManyEyesForConditionalGeneration, shape: ImageShape) -> dict[str, Tensor]:
    shared = model.shared_pixels
    if shared is not None:
        # A fixed grid of tiles is cut inside the model, from one tensor of the whole image.
        images = 1 if shared.image_grid > 1 else shape.tiles
        return {SHARED: torch.zeros(images, 3, shared.image_size, shared.image_size, device=_META)}
    whole = () if model.config.layout is None else TokenLayout.from_dict(model.config.layout).whole
    return {
        entry["name"]: torch.zeros(
            1 if entry["name"] in whole else shape.tiles, 3, entry["image_size"], entry["image_size"], device=_META
        )
        for entry in model.config.encoders
    }


def _image_sizes(model: ManyEyesForConditionalGeneration, shape: ImageShape) -> Tensor | None:
    if not model.fusion.uses_image_sizes:
        return None
    return torch.ones(shape.tiles, 2, dtype=torch.long, device=_META)


class _FusedAttention(torch.autograd.Function):
    """Attention as the fused kernels do it: the matrix of scores is not kept.

    The backward pass is counted without computing the scores again, as usual for model FLOPs.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = torch.matmul(torch.matmul(query, key.transpose(-2, -1)), value)
        # The fused kernels keep one number a query beside these, the logarithm of its softmax's sum.
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        (gradient,) = gradients
        scores = torch.empty(*query.shape[:-1], key.shape[-2], device=query.device, dtype=query.dtype)
        score_gradient = torch.matmul(gradient, value.transpose(-2, -1))
        return (
            torch.matmul(score_gradient, key),
            torch.matmul(score_gradient.transpose(-2, -1), query),
            torch.matmul(scores.transpose(-2, -1), gradient),
        )


class _FusedKernels(TorchFunctionMode):
    """Stands in for kernels that the meta device lacks, or that it computes otherwise than devices do."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch._grouped_mm:  # what functional.grouped_mm calls
            # Which expert a token goes to cannot be known here, and does not matter: experts are of one size. Elsewhere
            # than on the meta device this kernel takes fp32 too (torch 2.14).
            tokens, experts = args[:2]
            return torch.matmul(tokens, experts[0])
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **given)
        query, key, value = (*args, *(given[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        groups = query.shape[-3] // key.shape[-3]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=-3), value.repeat_interleave(groups, dim=-3)
        return _FusedAttention.apply(query, key, value)
