"""Questions that share a prefix: each goes on from it on its own.

Shapes: R prefixes, P prefix tokens, Q branches, L branch tokens, B rows, T tokens, D width, V vocabulary. ``_BTD``
behind a name says so.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from manyeyes.chat import IGNORE_INDEX
from manyeyes.errors import RecipeError, ShapeError
from manyeyes.model.language_model import compute_logits, decoder_of
from manyeyes.model.outputs import BranchAnswers, BranchOutput
from manyeyes.model.packing import can_pack, decode_packed


def forward_branches(
    language_model: PreTrainedModel,
    prefix_cache: Cache,
    prefix_mask: Tensor,
    rows: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor | None = None,
) -> BranchOutput:
    """Continue prefixes, each branch on its own: it sees its row's prefix and itself.

    Args:
        language_model: With the decoder that made the cache, its embeddings and head.
        prefix_cache: From ``prefill_prefix``; not changed.
        prefix_mask: ``[R, P]``, the prefixes' attention mask.
        rows: ``[Q]``, each branch's prefix.
        input_ids: ``[Q, L]``, padded on the right.
        attention_mask: ``[Q, L]``, 1 for real tokens.
        labels: ``[Q, L]``, not shifted, -100 where the loss does not count; never at a branch's first token.

    Returns:
        With labels the summed loss and how many tokens it counts; without, the logits after each branch's last
        token. Divide the sums of a whole optimizer step yourself.

    Raises:
        ShapeError: A branch's first token is supervised.
        RecipeError: The language model's cache cannot be shared.
    """
    if labels is not None and bool((labels[:, :1] != IGNORE_INDEX).any()):
        raise ShapeError(
            "the first token of a branch is supervised",
            "its logits belong to the prefix, which has no head",
            "Leave at least one token in front of the answer.",
        )
    prefix_QP = prefix_mask[rows]
    mask = torch.cat([prefix_QP, attention_mask], dim=1)
    position_ids = prefix_QP.sum(1, keepdim=True) + positions(attention_mask)
    cache = _select_rows(prefix_cache, rows)
    hidden_QLD = decoder_of(language_model)(
        inputs_embeds=language_model.get_input_embeddings()(input_ids),
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    output = BranchOutput(last_hidden_state=hidden_QLD, past_key_values=cache, attention_mask=mask)
    if labels is not None:
        output.loss, output.num_supervised = summed_loss(language_model, hidden_QLD, labels)
        return output
    last = attention_mask.sum(1) - 1
    output.logits = compute_logits(language_model, hidden_QLD[torch.arange(len(rows), device=last.device), last])
    return output


@torch.no_grad()
def decode_branches(
    language_model: PreTrainedModel,
    prefix_cache: Cache,
    prefix_mask: Tensor,
    rows: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
) -> BranchAnswers:
    """Answer greedily, every branch on its own.

    Args:
        language_model: With the decoder that made the cache, its embeddings and head.
        prefix_cache: From ``prefill_prefix``; not changed.
        prefix_mask: ``[R, P]``, the prefixes' attention mask.
        rows: ``[Q]``, each branch's prefix.
        input_ids: ``[Q, L]``, padded on the right; they end where the model goes on.
        attention_mask: ``[Q, L]``, 1 for real tokens.
        max_new_tokens: At most so many, at least 1.
        stop_token_ids: Ids that end an answer.

    Returns:
        The same ids as ``generate`` gives without its stop token, and the first logits.
    """
    if can_pack(language_model, prefix_cache):
        return decode_packed(
            language_model,
            prefix_cache,
            prefix_mask,
            rows,
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
        )
    output = forward_branches(language_model, prefix_cache, prefix_mask, rows, input_ids, attention_mask)
    assert output.logits is not None
    assert output.attention_mask is not None
    first_logits = logits = output.logits
    mask, cache = output.attention_mask, output.past_key_values
    stops = torch.tensor(list(stop_token_ids), dtype=torch.long, device=input_ids.device)
    answers: list[list[int]] = [[] for _ in range(len(rows))]
    running = torch.ones(len(rows), dtype=torch.bool, device=input_ids.device)
    for step in range(max_new_tokens):
        token_Q = logits.argmax(-1)
        running &= ~torch.isin(token_Q, stops)
        for branch in running.nonzero().flatten().tolist():
            answers[branch].append(int(token_Q[branch]))
        if step + 1 == max_new_tokens or not bool(running.any()):
            break
        positions = mask.sum(1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        hidden_Q1D = decoder_of(language_model)(
            inputs_embeds=language_model.get_input_embeddings()(token_Q[:, None]),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = compute_logits(language_model, hidden_Q1D[:, 0])
    return BranchAnswers(token_ids=answers, first_logits=first_logits)


def summed_loss(language_model: PreTrainedModel, hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy, summed, and over how many tokens.

    Args:
        language_model: Whose head is run.
        hidden_BTD: The decoder's last hidden state.
        labels_BT: Not shifted, -100 where the loss does not count.
    """
    # Only supervised positions reach the head: with a large vocabulary it is the dearest layer of all.
    targets = labels_BT[:, 1:]
    counted = targets != IGNORE_INDEX
    logits = compute_logits(language_model, hidden_BTD[:, :-1][counted]).float()
    loss = functional.cross_entropy(logits, targets[counted], reduction="sum")
    return loss, counted.sum()


def positions(mask: Tensor) -> Tensor:
    """Positions that do not depend on padding, ``[B, T]`` from a mask ``[B, T]``."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    # An embedding lookup, because its backward adds whole rows; index_select's adds element by element on a CPU.
    taken: Tensor = functional.embedding(rows, tensor.flatten(1)).unflatten(1, tensor.shape[1:])
    return taken


def _select_rows(cache: Cache, rows: Tensor) -> DynamicCache:
    """A cache whose row q is row ``rows[q]`` of another; differentiable, and the other stays as it is."""
    selected = DynamicCache()
    for layer in cache.layers:
        # Not isinstance: hybrid layers are DynamicLayers too, with a recurrent state that would keep its old rows.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise RecipeError(
                f"the language model caches {type(layer).__name__}",
                "branches need keys and values of attention",
                "Use turns: chained with this language model.",
            )
        own = copy.copy(layer)
        if layer.is_initialized:
            own.keys, own.values = _take_rows(layer.keys, rows), _take_rows(layer.values, rows)
        selected.layers.append(own)
    return selected
