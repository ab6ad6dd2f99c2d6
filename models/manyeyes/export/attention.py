"""Attention as the decoder's graph computes it: plain products, grouped heads, and scores in fp32.

ONNX Runtime has ``GroupQueryAttention``, which takes several new tokens after a past for one sequence only; a bundle
asks several questions that share a prefix at once. Plain products over groups (the query heads that share a key head
are rows of one product, so that no key or value is repeated) take about the same time as it; docs/performance.md has
the figures.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

_NAME = "manyeyes_grouped"
# What some families add to the scores; their own function knows how.
_OWN = ("softcap", "s_aux", "position_bias")
_LEAST = 80.0


def use_grouped_attention(language_model: PreTrainedModel) -> None:
    """Let a language model compute attention as its graph is to; families that cannot be told keep their own.

    Args:
        language_model: Is changed.
    """
    try:
        language_model.set_attn_implementation(_NAME)
    except ValueError:
        language_model.set_attn_implementation("eager")


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Shapes: ``[batch, heads, query, width]``, keys and values ``[batch, key heads, total, width]``."""
    if attention_mask is None or any(others.get(name) is not None for name in _OWN):
        own = sys.modules[type(module).__module__].eager_attention_forward
        outputs: tuple[Tensor, Tensor | None] = own(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
        return outputs
    batch, heads, length, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    groups = key.shape[1]
    whole = query.dtype == torch.float32
    # Products in fp16 end at 65,504, so queries are scaled before them; in fp32 the product itself can do it.
    rows = (query if whole else query * scale).reshape(batch, groups, heads // groups * length, width)
    products = torch.matmul(rows, key.transpose(2, 3))
    scores = (products * scale if whole else products).reshape(batch, heads, length, -1)
    # In fp16 the mask and a score below 0 would add up to minus infinity, and a row of those to no number.
    scores = scores.float() + attention_mask.float()
    if whole:
        # What the mask hides weighs exp(-88) in ONNX Runtime's softmax, which is no normal number: those take a
        # processor seven times as long. exp(-80) is one, and as little beside a weight of 1.
        scores = torch.maximum(scores, scores.amax(dim=-1, keepdim=True) - _LEAST)
    weights = torch.softmax(scores, dim=-1).to(query.dtype)
    mixed = torch.matmul(weights.reshape(batch, groups, heads // groups * length, -1), value)
    return mixed.reshape(batch, heads, length, value.shape[3]).transpose(1, 2), weights


AttentionInterface.register(_NAME, _grouped_attention)
# Additive, and finite: a row of padding alone then gives a finite result that nothing looks at.
AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
