"""One training sample on the meta device: what it computes and what it keeps for its backward pass.

The real model runs, forward and backward, at its true sizes and with the real frozen and trained groups, on tensors
that have a shape and no memory. Floating-point operations are counted by the formulas of ``torch.utils.flop_counter``;
kept tensors by ``torch.autograd.graph.saved_tensors_hooks``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.flop_counter import flop_registry

from manyeyes.model import ManyEyesForConditionalGeneration
from manyeyes.model.connection import VisualTokens
from manyeyes.model.language_model import compute_logits, decoder_of
from manyeyes.model.reinjection import VISUAL_CONTEXT, VisualContext
from manyeyes.processor import SHARED
from manyeyes.runtime.tiling import arrange_tokens

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
    layout = model.config.layout
    if layout is None:
        return ImageShape(tiles=1, tokens=per_tile, newlines=0)
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
        with _OperationCounter() as counter:
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
    return Counts(flops=int(counter.flops), saved_bytes=saved)


def count_forward(model: ManyEyesForConditionalGeneration, shape: ImageShape, *, text_tokens: int) -> int:
    """Operations of one forward pass over one image and its text: what answering starts with.

    Args:
        model: On the meta device.
        shape: What the image becomes.
        text_tokens: Tokens beside the visual ones; only the last one reaches the head.
    """
    with torch.no_grad(), _FusedKernels(), _OperationCounter() as counter:
        seen = model.encode_images(_pixels(model, shape), image_sizes=_image_sizes(model, shape))
        _loss(model, seen, shape, text_tokens=text_tokens, supervised=1)
    return int(counter.flops)


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
    whole = () if model.config.layout is None else model.config.layout.whole
    return {
        entry.name: torch.zeros(
            1 if entry.name in whole else shape.tiles, 3, entry.image_size, entry.image_size, device=_META
        )
        for entry in model.config.encoders
    }


def _image_sizes(model: ManyEyesForConditionalGeneration, shape: ImageShape) -> Tensor | None:
    if not model.fusion.uses_image_sizes:
        return None
    return torch.ones(shape.tiles, 2, dtype=torch.long, device=_META)


@dataclass(frozen=True)
class _Call:
    """What a call gives: shape, strides and dtype of each tensor (None stays None), how they are nested, its cost."""

    tensors: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...]
    nesting: TreeSpec
    flops: int


_KINDS: dict[Any, Literal["composite", "fresh", "other"]] = {}
_CALLS: dict[Any, _Call] = {}


class _OperationCounter(TorchDispatchMode):
    """Counts operations as ``FlopCounterMode`` does, and works out each kind of call once.

    Meta kernels are largely Python: a layer norm decomposes into dozens of calls, and its backward pass into more. A
    model repeats its layers, so nearly all calls have been seen before with the same shapes. A call is remembered only
    where its tensors are on the meta device and own their memory, so that the bytes kept for the backward pass are the
    same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        kind = _KINDS.get(func) or _KINDS.setdefault(func, _kind(func))
        if kind == "composite":
            with self:
                return func.decompose(*args, **given)
        key = (func, _signature(args), _signature(given)) if kind == "fresh" else None
        known = _CALLS.get(key)
        if known is not None:
            self.flops += known.flops
            return tree_unflatten([made and _empty(*made) for made in known.tensors], known.nesting)
        out = func(*args, **given)
        formula = flop_registry.get(func._overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **given, out_val=out))
        self.flops += flops
        if key is not None:
            leaves, nesting = tree_flatten(out)
            if _own_memory(leaves, tree_flatten((args, given))[0]):
                made = tuple(None if leaf is None else (leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves)
                _CALLS[key] = _Call(made, nesting, flops)
        return out


def _kind(func: Any) -> Literal["composite", "fresh", "other"]:
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return "composite"
    schema = func._schema
    aliases = schema.is_mutable or any(value.alias_info is not None for value in schema.returns)
    return "other" if aliases else "fresh"


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.device, value.dtype, value.shape, value.stride()
    if isinstance(value, list | tuple):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((name, _signature(entry)) for name, entry in value.items())
    return type(value), value  # 1, 1.0 and True are equal, and give other dtypes


def _empty(size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=_META)


def _own_memory(results: Sequence[Any], given: Sequence[Any]) -> bool:
    """Whether the results are whole tensors on the meta device, made of others there, and share no memory."""
    fresh = [leaf for leaf in results if leaf is not None]
    tensors = [*fresh, *(leaf for leaf in given if isinstance(leaf, Tensor))]
    if not all(isinstance(leaf, Tensor) and leaf.device == _META for leaf in tensors):
        return False
    taken = {leaf.untyped_storage()._cdata for leaf in tensors[len(fresh) :]}
    for leaf in fresh:
        storage = leaf.untyped_storage()
        whole = _empty(leaf.shape, leaf.stride(), leaf.dtype).untyped_storage().nbytes()
        if storage._cdata in taken or leaf.storage_offset() or storage.nbytes() != whole:
            return False
        taken.add(storage._cdata)
    return True


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
