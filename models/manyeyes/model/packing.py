"""Several questions a row: greedy answers without a copy of the prefix for each of them.

A row is its prefix and, behind it, some of its branches one after the other; what they write follows as it comes. The
attention mask keeps branches apart, and positions count each branch's own tokens, so that every branch computes what it
would alone. Keys and values are written into room made once, where a growing cache would be copied at every step.

Shapes: R prefixes, P prefix tokens, Q branches, L branch tokens, K packs, N new tokens of a call, S slots of keys, D
width, V vocabulary. ``_KN`` behind a name says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from manyeyes.model.language_model import compute_logits, decoder_of
from manyeyes.model.outputs import BranchAnswers

# Owners of slots that belong to no branch. Padding may look at padding: a row without anything to see gives NaN.
_PADDING, _PREFIX, _NOTHING = -1, -2, -3
# Packs run together while the narrowest has so much of the widest's tokens; the rest of it is padding.
_LEAST_FILLED = 2 / 3


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
    """``branches.decode_branches``, where ``can_pack`` says so; same arguments, same answers."""
    lengths = attention_mask.sum(1).tolist()
    together = plan_packs(rows.tolist(), lengths, room=prefix_mask.shape[1], spare=max_new_tokens)
    token_ids: list[list[int]] = [[] for _ in lengths]
    stops = frozenset(stop_token_ids)
    first_logits: Tensor | None = None
    for packs in together:
        decoding = _Decoding(language_model, prefix_cache, prefix_mask, packs, max_new_tokens=max_new_tokens)
        asked = [branch for pack in packs for branch in pack.branches]
        tokens = {branch: input_ids[branch, : lengths[branch]].tolist() for branch in asked}
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
        self,
        language_model: PreTrainedModel,
        prefix_cache: Cache,
        prefix_mask: Tensor,
        packs: Sequence[Pack],
        *,
        max_new_tokens: int,
    ) -> None:
        self._language_model = language_model
        self._packs = packs
        rows = torch.tensor([pack.row for pack in packs], device=prefix_mask.device)
        mask_KP = prefix_mask[rows]
        self._prefix_lengths = mask_KP.sum(1).tolist()
        self._owners_KS = torch.where(mask_KP.bool(), _PREFIX, _NOTHING)
        self._written = {branch: 0 for pack in packs for branch in pack.branches}
        widest = max(pack.width for pack in packs)
        answers = max(len(pack.branches) for pack in packs) * (max_new_tokens - 1)
        self._cache = DynamicCache()
        for layer in prefix_cache.layers:
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
