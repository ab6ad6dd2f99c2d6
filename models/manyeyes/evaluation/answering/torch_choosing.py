"""Multiple choice from one prefill of a checkpoint in PyTorch; ``runtime.choosing`` says what is chosen and why.

Shapes: Q branches, L branch tokens, R prefixes, P prefix tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from manyeyes.model import ManyEyesForConditionalGeneration
from manyeyes.model.language_model import compute_logits
from manyeyes.runtime.choosing import OptionIds, leading_options


@torch.inference_mode()
def choose_branches(
    model: ManyEyesForConditionalGeneration,
    prefix_cache: Cache,
    prefix_mask: Tensor,
    rows: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    options: Sequence[OptionIds],
    batch_size: int,
) -> list[int]:
    """Choose between the options of each branch.

    Args:
        model: Made the cache.
        prefix_cache: From ``prefill_prefix``; not changed.
        prefix_mask: ``[R, P]``, the prefixes' attention mask.
        rows: ``[Q]``, each branch's prefix.
        input_ids: ``[Q, L]``, padded on the right; they end where the model goes on.
        attention_mask: ``[Q, L]``, 1 for real tokens.
        options: Token ids of each branch's options; at least one each.
        batch_size: Most options a run, where first tokens do not decide.

    Returns:
        The place of each branch's chosen option.
    """
    asked = model.forward_branches(prefix_cache, prefix_mask, rows, input_ids, attention_mask)
    assert asked.logits is not None
    assert asked.attention_mask is not None
    firsts = [(branch, ids[0]) for branch, own in enumerate(options) for ids in own]
    scores = iter(asked.logits[_column(firsts, 0, asked.logits), _column(firsts, 1, asked.logits)].tolist())
    leading = [leading_options([next(scores) for _ in own], own) for own in options]
    tied = [(branch, place) for branch, places in enumerate(leading) if len(places) > 1 for place in places]
    sums: dict[tuple[int, int], float] = {}
    for start in range(0, len(tied), batch_size):
        part = tied[start : start + batch_size]
        added = _log_probabilities(
            model,
            asked.past_key_values,
            asked.attention_mask,
            _column(part, 0, asked.logits),
            [options[branch][place] for branch, place in part],
        )
        sums.update(zip(part, added, strict=True))
    return [max(places, key=lambda place: sums.get((branch, place), 0.0)) for branch, places in enumerate(leading)]


def _log_probabilities(
    model: ManyEyesForConditionalGeneration, cache: Cache, mask: Tensor, rows: Tensor, options: Sequence[Sequence[int]]
) -> list[float]:
    """Of each option's tokens behind its first, which all of a branch's options here share; added up."""
    width = max(len(ids) for ids in options)
    ids = torch.zeros((len(options), width), dtype=torch.long)
    real = torch.zeros_like(ids)
    for row, own in enumerate(options):
        ids[row, : len(own)] = torch.tensor(own)
        real[row, : len(own)] = 1
    ids, real = ids.to(mask.device), real.to(mask.device)
    output = model.forward_branches(cache, mask, rows, ids[:, :-1], real[:, :-1])
    assert output.last_hidden_state is not None
    logits = compute_logits(model.language_model, output.last_hidden_state)
    log_probabilities = logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    sums: list[float] = (log_probabilities * real[:, 1:]).sum(1).tolist()
    return sums


def _column(pairs: Sequence[tuple[int, int]], place: int, like: Tensor) -> Tensor:
    return torch.tensor([pair[place] for pair in pairs], dtype=torch.long, device=like.device)
