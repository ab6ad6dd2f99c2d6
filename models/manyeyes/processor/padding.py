"""Rows of tokens to one rectangle."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from manyeyes.chat import IGNORE_INDEX, BranchGroup, labels_of
from manyeyes.runtime.chat import Encoded


def pad_conversations(
    encoded: Sequence[Encoded], *, pad_id: int, side: Literal["left", "right"], labels: bool
) -> dict[str, Tensor]:
    """Pad conversations to one length.

    Args:
        encoded: Tokenised conversations.
        pad_id: Stands where nothing is.
        side: Where padding goes.
        labels: Whether to make ``labels``.

    Returns:
        ``input_ids``, ``attention_mask`` and, if asked for, ``labels``, ``[B, T]``; ``image_spans`` ``[I, 4]``.
    """
    input_ids, attention_mask = pad_rows([conversation.input_ids for conversation in encoded], pad_id, side=side)
    width = input_ids.shape[1]
    spans = [
        (row, start + (width - len(conversation.input_ids) if side == "left" else 0), length)
        for row, conversation in enumerate(encoded)
        for start, length in conversation.image_spans
    ]
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "image_spans": span_tensor(spans)}
    if labels:
        rows = [labels_of(conversation) for conversation in encoded]
        batch["labels"] = pad_rows(rows, IGNORE_INDEX, side=side)[0]
    return batch


def pad_branch_groups(groups: Sequence[BranchGroup], *, pad_id: int) -> dict[str, Tensor]:
    """Pad groups towards their meeting point: prefixes on the left, branches on the right.

    Args:
        groups: Tokenised questions about the same images.
        pad_id: Stands where nothing is.

    Returns:
        As ``ManyEyesProcessor.pad_groups``.
    """
    prefix_ids, prefix_mask = pad_rows([group.prefix_ids for group in groups], pad_id, side="left")
    width = prefix_ids.shape[1]
    spans = [
        (row, width - len(group.prefix_ids) + start, length)
        for row, group in enumerate(groups)
        for start, length in group.image_spans
    ]
    branches = [(row, branch) for row, group in enumerate(groups) for branch in group.branches]
    input_ids, attention_mask = pad_rows([branch.input_ids for _, branch in branches], pad_id, side="right")
    labels, _ = pad_rows([branch.labels for _, branch in branches], IGNORE_INDEX, side="right")
    return {
        "prefix_ids": prefix_ids,
        "prefix_mask": prefix_mask,
        "image_spans": span_tensor(spans),
        "rows": torch.tensor([row for row, _ in branches], dtype=torch.long),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
    }


def pad_rows(rows: Sequence[Sequence[int]], fill: int, *, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Values and the mask of what is real, ``[B, T]`` each."""
    lengths = np.array([len(row) for row in rows], np.int64)
    width = int(lengths.max(initial=0))
    columns = np.arange(width)
    real = columns >= width - lengths[:, None] if side == "left" else columns < lengths[:, None]
    values = np.full((len(rows), width), fill, np.int64)
    values[real] = np.fromiter(itertools.chain.from_iterable(rows), np.int64, count=int(lengths.sum()))
    return torch.from_numpy(values), torch.from_numpy(real.astype(np.int64))


def span_tensor(spans: Sequence[tuple[int, int, int]]) -> Tensor:
    """``[I, 4]``: row, start, length and image, images counted in order."""
    rows = [(row, start, length, image) for image, (row, start, length) in enumerate(spans)]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, 4)
