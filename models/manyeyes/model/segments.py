"""Samples side by side in one row, without padding: each sees itself, and the prefix that it continues, alone.

Attention is computed a segment at a time by torch's scaled dot product, which never looks at a neighbour; on a GPU by
flex attention, whose kernel skips the blocks that nobody sees. Both are one function of transformers' attention
interface, and all layers of a call are told the segments by a keyword, so no model is changed for it. Everything else
in a decoder works on each token alone.

Shapes: T tokens of the row, H heads, G heads of keys and values, W width of a head. ``_HTW`` behind a name says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from manyeyes.errors import RecipeError
from manyeyes.model.language_model import decoder_of

PACKED_ATTENTION = "manyeyes_packed"
"""Name of the attention among transformers' own; without ``segments`` it is ``sdpa``, mask and all."""

SEGMENTS = "segments"
"""The keyword argument that carries ``Segments`` to every layer's attention."""

# Branches of one prefix share a call up to so many tokens: a call costs a CPU as much as attention over about these.
_TOGETHER = 64
# What a family's attention may be handed that changes it.
_CHANGES = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class SegmentGroup:
    """A prefix and what goes on from it, or a sample alone.

    Attributes:
        prefix: Tokens of the prefix, or of the sample; 0 where branches have no prefix.
        branches: Tokens of each branch; each sees the prefix and itself.
    """

    prefix: int
    branches: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Of all of it."""
        return self.prefix + sum(self.branches)


@dataclass(frozen=True, eq=False)
class Segments:
    """Whose each token of a row is.

    Attributes:
        groups: In the order of the row; a prefix stands right in front of its branches.
        readers: Attention layers (by ``id``) that have looked here in this call; empty where a language model drops the
            keyword.
    """

    groups: tuple[SegmentGroup, ...]
    readers: set[int] = field(default_factory=set, init=False)
    _block_masks: dict[torch.device, BlockMask] = field(default_factory=dict, init=False)

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(group.num_tokens for group in self.groups)

    @property
    def longest(self) -> int:
        """Tokens that one sample sees at most, itself included."""
        return max(group.prefix + max(group.branches, default=0) for group in self.groups)

    def positions(self) -> Tensor:
        """``[1, T]``: each token's place in its own sample, the prefix included."""
        counted = [
            torch.arange(start, start + length)
            for group in self.groups
            for start, length in ((0, group.prefix), *((group.prefix, length) for length in group.branches))
        ]
        return torch.cat(counted)[None]

    def owners(self) -> tuple[Tensor, Tensor]:
        """``[T]`` each: the number of a token's segment, and of the one that it continues, which may be its own."""
        own: list[int] = []
        continued: list[int] = []
        number = 0
        for group in self.groups:
            prefix = number
            own += [prefix] * group.prefix
            continued += [prefix] * group.prefix
            for length in group.branches:
                number += 1
                own += [number] * length
                continued += [prefix] * length
            number += 1
        return torch.tensor(own), torch.tensor(continued)

    @cached_property
    def calls(self) -> tuple[_Call, ...]:
        """The calls of attention that make the row, in its order."""
        return tuple(call for group in self.groups for call in _calls(group))

    def block_mask(self, device: torch.device) -> BlockMask:
        """What flex attention skips, made once for all layers."""
        if device not in self._block_masks:
            self._block_masks[device] = create_block_mask(
                self.mask_function(device),
                B=None,
                H=None,
                Q_LEN=self.num_tokens,
                KV_LEN=self.num_tokens,
                device=device,
                # Uncompiled, it would make the whole [T, T] first.
                _compile=device.type == "cuda",
            )
        return self._block_masks[device]

    def mask_function(self, device: torch.device | str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Whether a token sees another, as flex attention asks: batch, head, and both tokens' places in the row."""
        own, continued = (owner.to(device) for owner in self.owners())

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
            related = (own[query] == own[key]) | (continued[query] == own[key])
            return (key <= query) & related

        return sees


@dataclass(frozen=True, eq=False)
class _Call:
    """Tokens of the row that attend together.

    Attributes:
        num_tokens: How many.
        prefix: Whether they are what later calls look back at.
        mask: ``[num_tokens, prefix + num_tokens]``, what they see; None where that is everything before.
    """

    num_tokens: int
    prefix: bool
    mask: Tensor | None


def _calls(group: SegmentGroup) -> Iterator[_Call]:
    if group.prefix:
        yield _Call(group.prefix, prefix=True, mask=None)
    together: list[int] = []
    for length in group.branches:
        if together and sum(together) + length > _TOGETHER:
            yield _branches(group.prefix, together)
            together = []
        together.append(length)
    if together:
        yield _branches(group.prefix, together)


def _branches(prefix: int, lengths: Sequence[int]) -> _Call:
    total = sum(lengths)
    if prefix == 0 and len(lengths) == 1:
        return _Call(total, prefix=False, mask=None)
    own = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths)).bool()
    return _Call(total, prefix=False, mask=torch.cat([torch.ones(total, prefix, dtype=torch.bool), own], dim=1))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: The layer's attention.
        query: ``[1, H, T, W]``; any number of rows without segments.
        key: ``[1, G, T, W]``.
        value: ``[1, G, T, W]``.
        attention_mask: Not looked at with segments.
        dropout: Of attention weights.
        scaling: Of scores; the width's own when left out.
        segments: Whose each token is; None for rows of one sample each.
        kwargs: What else a family hands down.

    Returns:
        ``[1, T, H, W]``, and no weights.

    Raises:
        RecipeError: The family's attention is more than a softmax over what a segment sees.
    """
    if segments is None:
        unpacked: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return unpacked
    changes = [name for name in _CHANGES if kwargs.get(name) is not None]
    window = kwargs.get("sliding_window")
    if window is not None and window < segments.longest:
        changes.append(f"sliding_window of {window} for samples of {segments.longest} tokens")
    if changes:
        raise _refusal(type(module).__name__, f"its attention has {', '.join(changes)}")
    segments.readers.add(id(module))
    if runs_flex(query.device, width=query.shape[-1], dropout=dropout):
        grouped = key.shape[1] != query.shape[1]
        mask = segments.block_mask(query.device)
        attended = _flex()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
        return attended.transpose(1, 2).contiguous(), None
    repeats = query.shape[1] // key.shape[1]
    return attend_by_segment(
        query, repeat_kv(key, repeats), repeat_kv(value, repeats), segments, dropout=dropout, scaling=scaling
    ), None


def attend_by_segment(
    query_HTW: Tensor,
    key_HTW: Tensor,
    value_HTW: Tensor,
    segments: Segments,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> Tensor:
    """Scaled dot product attention, a segment at a time.

    Args:
        query_HTW: ``[1, H, T, W]``.
        key_HTW: ``[1, H, T, W]``.
        value_HTW: ``[1, H, T, W]``.
        segments: Whose each token is.
        dropout: Of attention weights.
        scaling: Of scores; the width's own when left out.

    Returns:
        ``[1, T, H, W]``.
    """
    lengths = [call.num_tokens for call in segments.calls]
    attended: list[Tensor] = []
    prefix: tuple[Tensor, Tensor] | None = None
    # Not slices: the backward pass of each would make a gradient of the whole row.
    parts = (states.split(lengths, dim=2) for states in (query_HTW, key_HTW, value_HTW))
    for call, query, key, value in zip(segments.calls, *parts, strict=True):
        if call.prefix:
            prefix = key, value
        elif call.mask is not None and call.mask.shape[1] > call.num_tokens:
            assert prefix is not None
            key, value = torch.cat([prefix[0], key], dim=2), torch.cat([prefix[1], value], dim=2)
        part = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if call.mask is None else call.mask.to(query.device),
            dropout_p=dropout,
            is_causal=call.mask is None,
            scale=scaling,
        )
        attended.append(part.transpose(1, 2))
    return torch.cat(attended, dim=1)


def runs_flex(device: torch.device, *, width: int, dropout: float) -> bool:
    """Whether flex attention runs here: on NVIDIA's GPUs from Ampere on, where Triton compiles it.

    Args:
        device: Of the states.
        width: W; its kernels need 16 at least.
        dropout: Of attention weights, which it has none of.
    """
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and find_spec("triton") is not None
        and width >= 16
        and dropout == 0.0
    )


@cache
def _flex() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


def enable_packing(language_model: PreTrainedModel, *, longest: int) -> None:
    """Let a language model take ``segments``; rows of one sample each are computed as before.

    Args:
        language_model: A causal language model.
        longest: Tokens that a sample has at most.

    Raises:
        RecipeError: Its attention cannot be packed.
    """
    check_packable(type(language_model), language_model.config, longest=longest)
    if "position_ids" not in inspect.signature(decoder_of(language_model).forward).parameters:
        raise _refusal(type(language_model).__name__, "it is not told positions")
    language_model.set_attn_implementation(PACKED_ATTENTION)


def check_packable(family: type[PreTrainedModel], config: PreTrainedConfig, *, longest: int) -> None:
    """Make sure, without any weights, that a family's attention can be packed.

    Args:
        family: Class of the language model.
        config: Its configuration.
        longest: Tokens that a sample has at most.

    Raises:
        RecipeError: It cannot.
    """
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    reason = None
    if getattr(family, "_is_stateful", False):
        reason = "it keeps a state from token to token"
    elif getattr(config, "alibi", False):
        reason = "it counts distances in the row (ALiBi)"
    elif getattr(config, "attn_logit_softcapping", None) is not None:
        reason = f"it caps attention scores (attn_logit_softcapping {config.attn_logit_softcapping})"
    elif not (family._supports_sdpa and family._can_set_attn_implementation()):
        reason = "its attention is its own, not one of transformers' attention interface"
    elif kinds:
        reason = f"it has layers of {', '.join(sorted(kinds))}"
    elif window is not None and window < longest:
        reason = f"it slides windows of {window} tokens over samples of up to {longest}"
    if reason is not None:
        raise _refusal(family.__name__, reason)


def check_segments_read(segments: Segments, language_model: PreTrainedModel) -> None:
    """Make sure that every layer has looked at the segments of a call.

    Args:
        segments: What the call carried.
        language_model: Which was called.

    Raises:
        RecipeError: A layer has not: samples saw each other.
    """
    if len(segments.readers) < language_model.config.get_text_config().num_hidden_layers:
        raise _refusal(type(language_model).__name__, "not all of its layers are told whose each token is")


def _refusal(family: str, reason: str) -> RecipeError:
    return RecipeError(
        f"packing with a {family}: {reason}",
        "samples that share a row must be kept apart in every layer",
        "Leave packing out of the stage, or use a language model like Llama, Mistral without a window, Qwen or Gemma.",
    )
