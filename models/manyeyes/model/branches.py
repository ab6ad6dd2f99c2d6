"""Questions that share a prefix: each goes on from it on its own.

Greedy answers come from packs, without a copy of the prefix for each question. A row is its prefix and, behind it,
some of its branches one after the other; what they write follows as it comes. The attention mask keeps branches apart,
and positions count each branch's own tokens, so that every branch computes what it would alone. Keys and values are
written into room made once, where a growing cache would be copied at every step.

Shapes: R prefixes, P prefix tokens, Q branches, L branch tokens, B rows, T tokens, K packs, N new tokens of a call, S
slots of keys, D width, V vocabulary. ``_BTD`` behind a name says so.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from manyeyes.chat import IGNORE_INDEX
from manyeyes.errors import RecipeError, ShapeError
from manyeyes.model.language_model import compute_logits, decoder_of


@dataclass
class ManyEyesOutput(CausalLMOutputWithPast):
    """Output of ``forward``; ``num_supervised`` counts the tokens behind ``loss``."""

    num_supervised: Tensor | None = None


@dataclass
class BranchOutput(ModelOutput):
    """Output of ``forward_branches``.

    Attributes:
        loss: Sum over supervised tokens, with labels.
        num_supervised: How many there are, with labels.
        logits: ``[Q, V]`` after the last token of each branch, without labels.
        last_hidden_state: ``[Q, L, D]``.
        past_key_values: Prefix and branch, to go on from.
        attention_mask: ``[Q, P + L]`` over that cache.
    """

    loss: Tensor | None = None
    num_supervised: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    attention_mask: Tensor | None = None


@dataclass(frozen=True)
class BranchAnswers:
    """Greedy answers of ``decode_branches``.

    Attributes:
        token_ids: Per branch the generated ids, the stop token left out.
        first_logits: ``[Q, V]``, before the first generated token.
    """

    token_ids: list[list[int]]
    first_logits: Tensor


# Owners of slots that belong to no branch. Padding may look at padding: a row without anything to see gives NaN.
_PADDING, _PREFIX, _NOTHING = -1, -2, -3
# Packs run together while the narrowest has so much of the widest's tokens; the rest of it is padding.
_LEAST_FILLED = 2 / 3
# Logits that are held at a time, 128 MB of them in fp32: 1,024 tokens with a vocabulary of 32,768. Fewer would be too
# few for a GPU's matrix products.
LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class BranchBatch:
    """Branches, and the prefixes that they continue.

    Attributes:
        prefix_cache: Keys and values of the prefixes, from ``prefill_prefix``; not changed.
        prefix_mask: ``[R, P]``, the prefixes' attention mask.
        rows: ``[Q]``, each branch's prefix.
        input_ids: ``[Q, L]``, padded on the right.
        attention_mask: ``[Q, L]``, 1 for real tokens.
        labels: ``[Q, L]``, not shifted, -100 where the loss does not count; never at a branch's first token.
    """

    prefix_cache: Cache
    prefix_mask: Tensor
    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True)
class Pack:
    """Branches that share a row.

    Attributes:
        row: Their prefix.
        branches: Which they are.
        width: Tokens of all of them together.
    """

    row: int
    branches: tuple[int, ...]
    width: int


def can_pack(language_model: PreTrainedModel, prefix_cache: Cache) -> bool:
    """Whether a language model's attention follows a mask of any form.

    It does where transformers' own attention functions run and take the mask as it is given; not where the mask is
    made anew from the places of tokens (sliding windows, ALiBi) or memory is no attention's.
    """
    return (
        bool(language_model._supports_attention_backend)
        and language_model.config._attn_implementation in ("sdpa", "eager")
        and "position_ids" in inspect.signature(decoder_of(language_model).forward).parameters
        and all(type(layer) is DynamicLayer for layer in prefix_cache.layers)
    )


def plan_packs(rows: Sequence[int], lengths: Sequence[int], *, room: int, spare: int) -> list[list[Pack]]:
    """Put branches together.

    Attention runs over all of a pack, so a pack is about as long as the prefix that it saves copies of: it then costs
    at most twice the attention of one branch alone.

    Args:
        rows: Each branch's prefix.
        lengths: Each branch's tokens.
        room: Tokens that a pack may have, those of the answers included; a branch that has more stands alone.
        spare: Tokens of a branch's answer.

    Returns:
        Packs of about the same width, in lists that may run together.
    """
    packs: list[Pack] = []
    by_row: dict[int, list[int]] = {}
    for branch, row in enumerate(rows):
        by_row.setdefault(row, []).append(branch)
    for row, branches in by_row.items():
        # As even as can be: seven branches of which three fit are three, two and two.
        total = sum(lengths[branch] + spare for branch in branches)
        share = total / max(1, -(-total // max(room, 1)))
        chosen: list[int] = []
        done, closed = 0, 1
        for branch in branches:
            done += lengths[branch] + spare
            chosen.append(branch)
            if done >= closed * share or branch == branches[-1]:
                packs.append(Pack(row, tuple(chosen), sum(lengths[each] for each in chosen)))
                chosen, closed = [], int(done // share) + 1
    packs.sort(key=lambda pack: -pack.width)
    together: list[list[Pack]] = []
    for pack in packs:
        if not together or pack.width < _LEAST_FILLED * together[-1][0].width:
            together.append([])
        together[-1].append(pack)
    return together


@torch.no_grad()
def decode_packed(
    language_model: PreTrainedModel, batch: BranchBatch, *, max_new_tokens: int, stop_token_ids: Sequence[int]
) -> BranchAnswers:
    """``branches.decode_branches``, where ``can_pack`` says so; same arguments, same answers."""
    lengths = batch.attention_mask.sum(1).tolist()
    together = plan_packs(batch.rows.tolist(), lengths, room=batch.prefix_mask.shape[1], spare=max_new_tokens)
    token_ids: list[list[int]] = [[] for _ in lengths]
    stops = frozenset(stop_token_ids)
    first_logits: Tensor | None = None
    for packs in together:
        decoding = _Decoding(language_model, batch, packs, max_new_tokens=max_new_tokens)
        asked = [branch for pack in packs for branch in pack.branches]
        tokens = {branch: batch.input_ids[branch, : lengths[branch]].tolist() for branch in asked}
        logits = decoding.run(tokens)
        if first_logits is None:
            first_logits = logits.new_zeros(len(lengths), logits.shape[1])
        first_logits[torch.tensor(asked, device=logits.device)] = logits
        running = asked
        for step in range(max_new_tokens):
            chosen = dict(zip(running, logits.argmax(-1).tolist(), strict=True))
            running = [branch for branch in running if chosen[branch] not in stops]
            for branch in running:
                token_ids[branch].append(chosen[branch])
            if step + 1 == max_new_tokens or not running:
                break
            logits = decoding.run({branch: [chosen[branch]] for branch in running})
    assert first_logits is not None, "no branches"
    return BranchAnswers(token_ids=token_ids, first_logits=first_logits)


class _Decoding:
    """Packs on their way: their cache, and whose each of its slots is."""

    def __init__(
        self, language_model: PreTrainedModel, batch: BranchBatch, packs: Sequence[Pack], *, max_new_tokens: int
    ) -> None:
        self._language_model = language_model
        self._packs = packs
        rows = torch.tensor([pack.row for pack in packs], device=batch.prefix_mask.device)
        mask_KP = batch.prefix_mask[rows]
        self._prefix_lengths = mask_KP.sum(1).tolist()
        self._owners_KS = torch.where(mask_KP.bool(), _PREFIX, _NOTHING)
        self._written = {branch: 0 for pack in packs for branch in pack.branches}
        widest = max(pack.width for pack in packs)
        answers = max(len(pack.branches) for pack in packs) * (max_new_tokens - 1)
        self._cache = DynamicCache()
        for layer in batch.prefix_cache.layers:
            self._cache.layers.append(_Room(layer, rows, slots=mask_KP.shape[1] + widest + answers))

    def run(self, tokens: dict[int, list[int]]) -> Tensor:
        """Go on with some of the branches.

        Args:
            tokens: New tokens of each.

        Returns:
            ``[Q, V]``, the logits behind each branch's last token, in the order of ``tokens``.
        """
        ids: list[list[int]] = []
        owners: list[list[int]] = []
        positions: list[list[int]] = []
        last: dict[int, tuple[int, int]] = {}
        for place, pack in enumerate(self._packs):
            ids.append([])
            owners.append([])
            positions.append([])
            for branch in pack.branches:
                new = tokens.get(branch, [])
                start = self._prefix_lengths[place] + self._written[branch]
                ids[place] += new
                owners[place] += [branch] * len(new)
                positions[place] += range(start, start + len(new))
                self._written[branch] += len(new)
                last[branch] = (place, len(ids[place]) - 1)
        device = self._owners_KS.device
        owners_KN = _rectangle(owners, _PADDING, device)
        mask = self._mask(owners_KN)
        model = self._language_model
        embeddings = model.get_input_embeddings()(_rectangle(ids, 0, device))
        hidden_KND = decoder_of(model)(
            inputs_embeds=embeddings,
            attention_mask=torch.zeros(mask.shape, dtype=embeddings.dtype, device=device).masked_fill_(
                ~mask, torch.finfo(embeddings.dtype).min
            ),
            position_ids=_rectangle(positions, 0, device),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        places = torch.tensor([last[branch] for branch in tokens], device=device)
        return compute_logits(model, hidden_KND[places[:, 0], places[:, 1]])

    def _mask(self, owners_KN: Tensor) -> Tensor:
        """``[K, 1, N, S]``: what each new token may look at. Its slots are taken."""
        before = self._owners_KS.shape[1]
        self._owners_KS = torch.cat([self._owners_KS, owners_KN], dim=1)
        slots = torch.arange(self._owners_KS.shape[1], device=owners_KN.device)
        own = self._owners_KS[:, None, :] == owners_KN[:, :, None]
        earlier = slots[None, :] <= slots[before:, None]
        prefix = (self._owners_KS == _PREFIX)[:, None, :]
        return (prefix | (own & earlier))[:, None]


class _Room(DynamicLayer):
    """Keys and values of a layer with room for all that will come, so that nothing is copied to make it."""

    def __init__(self, prefix: DynamicLayer, rows: Tensor, *, slots: int) -> None:
        super().__init__()
        self._slots = slots
        self._all: tuple[Tensor, Tensor] | None = None
        self._held = 0
        if prefix.is_initialized:
            self.update(prefix.keys[rows], prefix.values[rows])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Write behind what is there."""
        if self._all is None:
            self.lazy_initialization(key_states, value_states)
            self._all = self._make_room(key_states), self._make_room(value_states)
        start, self._held = self._held, self._held + key_states.shape[-2]
        for room, new in zip(self._all, (key_states, value_states), strict=True):
            room[:, :, start : self._held] = new
        self.keys, self.values = (room[:, :, : self._held] for room in self._all)
        return self.keys, self.values

    def _make_room(self, states: Tensor) -> Tensor:
        rows, heads, _, width = states.shape
        return states.new_empty(rows, heads, self._slots, width)


def _rectangle(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)


def forward_branches(language_model: PreTrainedModel, batch: BranchBatch) -> BranchOutput:
    """Continue prefixes, each branch on its own: it sees its row's prefix and itself.

    Args:
        language_model: With the decoder that made the cache, its embeddings and head.
        batch: The branches and their prefixes.

    Returns:
        With labels the summed loss and how many tokens it counts; without, the logits after each branch's last
        token. Divide the sums of a whole optimizer step yourself.

    Raises:
        ShapeError: A branch's first token is supervised.
        RecipeError: The language model's cache cannot be shared.
    """
    labels = batch.labels
    if labels is not None and bool((labels[:, :1] != IGNORE_INDEX).any()):
        raise ShapeError(
            "the first token of a branch is supervised",
            "its logits belong to the prefix, which has no head",
            "Leave at least one token in front of the answer.",
        )
    prefix_QP = batch.prefix_mask[batch.rows]
    mask = torch.cat([prefix_QP, batch.attention_mask], dim=1)
    position_ids = prefix_QP.sum(1, keepdim=True) + positions(batch.attention_mask)
    cache = _select_rows(batch.prefix_cache, batch.rows)
    hidden_QLD = decoder_of(language_model)(
        inputs_embeds=language_model.get_input_embeddings()(batch.input_ids),
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    output = BranchOutput(last_hidden_state=hidden_QLD, past_key_values=cache, attention_mask=mask)
    if labels is not None:
        output.loss, output.num_supervised = summed_loss(language_model, hidden_QLD, labels)
        return output
    last = batch.attention_mask.sum(1) - 1
    output.logits = compute_logits(language_model, hidden_QLD[torch.arange(len(last), device=last.device), last])
    return output


@torch.no_grad()
def decode_branches(
    language_model: PreTrainedModel, batch: BranchBatch, *, max_new_tokens: int, stop_token_ids: Sequence[int]
) -> BranchAnswers:
    """Answer greedily, every branch on its own.

    Args:
        language_model: With the decoder that made the cache, its embeddings and head.
        batch: The branches, which end where the model goes on, and their prefixes.
        max_new_tokens: At most N, at least 1.
        stop_token_ids: Ids that end an answer.

    Returns:
        The same ids as ``generate`` gives without its stop token, and the first logits.
    """
    if can_pack(language_model, batch.prefix_cache):
        return decode_packed(language_model, batch, max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids)
    output = forward_branches(language_model, replace(batch, labels=None))
    assert output.logits is not None
    assert output.attention_mask is not None
    first_logits = logits = output.logits
    mask, cache = output.attention_mask, output.past_key_values
    stops = torch.tensor(list(stop_token_ids), dtype=torch.long, device=batch.input_ids.device)
    answers: list[list[int]] = [[] for _ in range(len(batch.rows))]
    running = torch.ones(len(batch.rows), dtype=torch.bool, device=batch.input_ids.device)
    for step in range(max_new_tokens):
        token_Q = logits.argmax(-1)
        running &= ~torch.isin(token_Q, stops)
        for branch in running.nonzero().flatten().tolist():
            answers[branch].append(int(token_Q[branch]))
        if step + 1 == max_new_tokens or not bool(running.any()):
            break
        positions = mask.sum(1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(batch.rows), 1)], dim=1)
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

    Only supervised positions reach the head: with a large vocabulary it is the most expensive layer of all. Where their
    logits would be more than ``LOGITS_AT_ONCE`` numbers they are made in chunks, and again in the backward pass.

    Args:
        language_model: Whose head is run.
        hidden_BTD: The decoder's last hidden state.
        labels_BT: Not shifted, -100 where the loss does not count.
    """
    targets = labels_BT[:, 1:]
    counted = targets != IGNORE_INDEX
    hidden, wanted = hidden_BTD[:, :-1][counted], targets[counted]
    at_once = max(1, LOGITS_AT_ONCE // language_model.get_output_embeddings().weight.shape[0])
    if len(wanted) <= at_once:
        return _loss_of(language_model, hidden, wanted), counted.sum()
    losses = [
        checkpoint(_loss_of, language_model, some, own, use_reentrant=False, preserve_rng_state=False)
        for some, own in zip(hidden.split(at_once), wanted.split(at_once), strict=True)
    ]
    return torch.stack(losses).sum(), counted.sum()


def _loss_of(language_model: PreTrainedModel, hidden: Tensor, wanted: Tensor) -> Tensor:
    return functional.cross_entropy(compute_logits(language_model, hidden).float(), wanted, reduction="sum")


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
