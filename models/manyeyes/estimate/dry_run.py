"""One training sample on the meta device: what it computes and what it keeps for its backward pass.

The real model runs, forward and backward, at its true sizes and with the real frozen and trained groups, on tensors
that have a shape and no memory. Floating-point operations are counted by the formulas of ``torch.utils.flop_counter``;
kept tensors by ``torch.autograd.graph.saved_tensors_hooks``.

Of the language model's layers, two of each kind run: what one more of them adds is added for those left out. That is
exact, because a layer's cost depends on its kind and its place alone: the first one's input may need no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.flop_counter import flop_registry

from manyeyes.encoders import Encoder
from manyeyes.model import ManyEyesForConditionalGeneration
from manyeyes.model.connection import VisualTokens
from manyeyes.model.language_model import compute_logits, decoder_layers, decoder_of
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

    Bytes are those of distinct tensors kept for the backward pass, in the dtype of the model; parameters and buffers
    are left out.

    Attributes:
        flops: Forward and backward; a multiplication and an addition count as two.
        image_bytes: Of encoders, fusion and projector.
        layers_bytes: Of all layers of the language model.
        layer_bytes: Of the one that keeps most.
        other_bytes: Of what stands around the layers, the loss with it.
    """

    flops: int
    image_bytes: int
    layers_bytes: int
    layer_bytes: int
    other_bytes: int

    @property
    def saved_bytes(self) -> int:
        """All that is kept."""
        return self.image_bytes + self.layers_bytes + self.other_bytes


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
    model: ManyEyesForConditionalGeneration,
    shape: ImageShape,
    *,
    text_tokens: int,
    longest_text: int,
    supervised: int,
    checkpoint_encoders: bool = False,
) -> Counts:
    """Run one image and its text through the model on the meta device, forward and backward.

    Args:
        model: On the meta device, its parameters frozen or not as the stage says.
        shape: What the image becomes.
        text_tokens: Tokens beside the visual ones, for the operations.
        longest_text: The same for the bytes.
        supervised: Tokens that reach the head, at most; the last ones.
        checkpoint_encoders: Encoders compute the inside of their blocks again, for the bytes.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            kept[key] = tensor
        return tensor

    def held() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    keeping = torch.autograd.graph.saved_tensors_hooks

    def see() -> Tensor | VisualTokens:
        return model.encode_images(_pixels(model, shape), image_sizes=_image_sizes(model, shape))

    def through_layers() -> _Cost:
        with _OperationCounter() as counter:
            loss = _loss(model, shown, shape, text_tokens=text_tokens, supervised=min(text_tokens, supervised))
            if loss.requires_grad:
                loss.backward(retain_graph=True)
        before = held()
        with keeping(keep, lambda tensor: tensor):
            _loss(model, shown, shape, text_tokens=longest_text, supervised=min(longest_text, supervised))
        return _Cost(int(counter.flops), held() - before)

    with _FusedKernels(autocast=model.dtype == torch.bfloat16):
        # The images cost the same whatever stands beside them: they run once. So does their backward pass, where they
        # give one tensor.
        with _OperationCounter() as images:
            with keeping(keep, lambda tensor: tensor):
                seen = see()
            shown = seen
            if isinstance(seen, Tensor) and seen.requires_grad:
                shown = seen.detach().requires_grad_()
                seen.backward(torch.empty_like(seen), retain_graph=True)
        image_bytes = held()
        if checkpoint_encoders:
            # What is computed again is no part of what the model computes: operations were counted without.
            kept.clear()
            with _checkpointing(model), keeping(keep, lambda tensor: tensor):
                again = see()
            image_bytes = held()
            del again
        stack = decoder_layers(model.language_model)
        whole, each = _count_layers(stack, through_layers)
    model.zero_grad(set_to_none=True)
    layers_bytes = sum(cost.saved for cost in each)
    return Counts(
        flops=int(images.flops) + whole.flops,
        image_bytes=image_bytes,
        layers_bytes=layers_bytes,
        layer_bytes=max(cost.saved for cost in each),
        other_bytes=whole.saved - layers_bytes,
    )


@contextmanager
def _checkpointing(model: ManyEyesForConditionalGeneration) -> Iterator[None]:
    encoders = [encoder for encoder in model.encoders.values() if isinstance(encoder, Encoder)]
    for encoder in encoders:
        encoder.set_checkpointing(True)
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.set_checkpointing(False)


@dataclass(frozen=True)
class _Cost:
    """Operations, and bytes kept for the backward pass."""

    flops: int
    saved: int


def _count_layers(stack: nn.ModuleList, run: Callable[[], _Cost]) -> tuple[_Cost, list[_Cost]]:
    """What running the whole stack costs, and what each layer adds to it.

    Args:
        stack: The layers of a decoder; whole again afterwards.
        run: Runs the decoder.
    """
    kinds: dict[Any, list[int]] = {}
    for number, layer in enumerate(stack):
        # Apart from the others: what is before the first layer may need no gradient.
        kinds.setdefault((_kind_of_layer(layer), number == 0), []).append(number)
    chosen = sorted(number for numbers in kinds.values() for number in numbers[:2])
    with _only(stack, chosen):
        base = run()
    flops, saved, each = base.flops, base.saved, [base] * len(stack)
    for numbers in kinds.values():
        with _only(stack, [number for number in chosen if number != numbers[:2][-1]]):
            less = run()
        one = _Cost(base.flops - less.flops, base.saved - less.saved)
        flops += one.flops * (len(numbers) - len(numbers[:2]))
        saved += one.saved * (len(numbers) - len(numbers[:2]))
        for number in numbers:
            each[number] = one
    return _Cost(flops, saved), each


def _kind_of_layer(layer: nn.Module) -> Any:
    parameters = tuple((name, one.shape, one.requires_grad) for name, one in layer.named_parameters())
    return type(layer), parameters, len(layer._forward_hooks)


@contextmanager
def _only(stack: nn.ModuleList, numbers: Sequence[int]) -> Iterator[None]:
    """Leave some layers in the stack."""
    layers = stack._modules
    stack._modules = {str(place): layers[str(number)] for place, number in enumerate(numbers)}
    try:
        yield
    finally:
        stack._modules = layers


def count_forward(model: ManyEyesForConditionalGeneration, shape: ImageShape, *, text_tokens: int) -> int:
    """Operations of one forward pass over one image and its text: what answering starts with.

    Args:
        model: On the meta device.
        shape: What the image becomes.
        text_tokens: Tokens beside the visual ones; only the last one reaches the head.
    """
    with torch.no_grad(), _FusedKernels(autocast=False), _OperationCounter() as counter:
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


# What autocast computes in bf16 and in fp32 on CUDA (torch 2.14); it leaves the meta device alone.
_IN_BF16 = {
    functional.linear,
    functional.conv2d,
    functional.scaled_dot_product_attention,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    torch._grouped_mm,
}
_IN_FP32 = {functional.layer_norm, functional.group_norm, functional.softmax, torch.softmax, Tensor.softmax}


def _cast(values: Any, dtype: torch.dtype) -> Any:
    leaves, nesting = tree_flatten(values)
    cast = [leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf for leaf in leaves]
    return tree_unflatten(cast, nesting)


class _FusedKernels(TorchFunctionMode):
    """Stands in for kernels that the meta device lacks, or that it computes otherwise than devices do."""

    def __init__(self, *, autocast: bool) -> None:
        super().__init__()
        self._autocast = autocast

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if self._autocast and (func in _IN_BF16 or func in _IN_FP32):
            args, given = _cast((args, given), torch.bfloat16 if func in _IN_BF16 else torch.float32)
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
