"""Micro-batches of samples side by side in one row: which samples share one, and the row that they make.

A step's samples are the same as without packing, so its loss is too. Who computes what is a function of their sizes
alone: every process works it out for itself, and a stage that was killed goes on with the very same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyeyes.chat import IGNORE_INDEX, BranchGroup, labels_of
from manyeyes.model.segments import SegmentGroup, Segments
from manyeyes.processor import span_tensor
from manyeyes.recipe import PackingSpec
from manyeyes.runtime.chat import Encoded


@dataclass(frozen=True)
class SampleSize:
    """What a sample costs.

    Attributes:
        tokens: Of all its conversations, visual tokens included; a prefix that branches share counts once.
        images: As the encoders see them: each tile is one.
    """

    tokens: int
    images: int


def share_out(sizes: Sequence[SampleSize], packing: PackingSpec, *, num_ranks: int) -> list[list[list[int]]]:
    """Share a step's samples out over processes and their micro-batches.

    The largest go first, each to the micro-batch that has least, in as few rounds as hold them all; in a round every
    process runs one micro-batch, of about the same cost as the others'.

    Args:
        sizes: Of the step's samples.
        packing: What a micro-batch may hold. A sample that is larger stands alone.
        num_ranks: Processes.

    Returns:
        For each process its micro-batches, in order: places in ``sizes``. Each sample stands in one of them.
    """
    costs = [_cost(size, packing) for size in sizes]
    order = sorted(range(len(sizes)), key=lambda place: (-costs[place], place))
    rounds = math.ceil(max(_least_bins(sizes, packing), 1) / num_ranks)
    while (found := _fill(order, sizes, costs, packing, bins=rounds * num_ranks)) is None:
        rounds += 1
    # Those of about the same cost run at the same time; who has more of one round has less of the next.
    filled = sorted(found, key=lambda bin_: (-sum(costs[place] for place in bin_), bin_))
    shares: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for number, start in enumerate(range(0, len(filled), num_ranks)):
        for rank, own in zip(
            shares if number % 2 == 0 else reversed(shares), filled[start : start + num_ranks], strict=True
        ):
            if own:
                rank.append(sorted(own))
    return shares


def _cost(size: SampleSize, packing: PackingSpec) -> float:
    return size.tokens / packing.tokens + (0.0 if packing.images is None else size.images / packing.images)


def _least_bins(sizes: Sequence[SampleSize], packing: PackingSpec) -> int:
    by_tokens = math.ceil(sum(size.tokens for size in sizes) / packing.tokens)
    by_images = 0 if packing.images is None else math.ceil(sum(size.images for size in sizes) / packing.images)
    return max(by_tokens, by_images)


def _fill(
    order: Sequence[int], sizes: Sequence[SampleSize], costs: Sequence[float], packing: PackingSpec, *, bins: int
) -> list[list[int]] | None:
    """Samples in each of so many micro-batches; None where they do not fit."""
    filled: list[list[int]] = [[] for _ in range(bins)]
    tokens, images, load = [0] * bins, [0] * bins, [0.0] * bins
    for place in order:
        size = sizes[place]
        fitting = [
            number
            for number in range(bins)
            if not filled[number]
            or (
                tokens[number] + size.tokens <= packing.tokens
                and (packing.images is None or images[number] + size.images <= packing.images)
            )
        ]
        if not fitting:
            return None
        chosen = min(fitting, key=lambda number: (load[number], number))
        filled[chosen].append(place)
        tokens[chosen] += size.tokens
        images[chosen] += size.images
        load[chosen] += costs[place]
    return filled


def packed_micro_batches(
    step: int,
    *,
    measure: Callable[[int], SampleSize],
    packing: PackingSpec,
    batch_size: int,
    num_samples: int,
    rank: int,
    num_ranks: int,
) -> list[list[int]]:
    """The micro-batches of a process in a step: a ``Plan`` of ``ahead``, once its other arguments are given.

    Args:
        step: From 0.
        measure: What the sample at a position costs. Every process asks for all of the step, which needs texts alone.
        packing: What a micro-batch may hold.
        batch_size: Samples of a step, over all ranks.
        num_samples: In the stage; its last step takes what is left.
        rank: This process.
        num_ranks: Processes that train.
    """
    positions = range(step * batch_size, min((step + 1) * batch_size, num_samples))
    shares = share_out([measure(position) for position in positions], packing, num_ranks=num_ranks)
    return [[positions[place] for place in micro_batch] for micro_batch in shares[rank]]


def pack_row(groups: Sequence[BranchGroup], chains: Sequence[Encoded]) -> tuple[dict[str, Tensor], Segments]:
    """Samples side by side.

    Args:
        groups: Independent samples.
        chains: Chained samples; their images follow those of the groups.

    Returns:
        ``input_ids`` and ``labels`` ``[1, T]`` and ``image_spans`` ``[I, 4]``, and whose each token is.
    """
    ids: list[int] = []
    labels: list[int] = []
    spans: list[tuple[int, int, int]] = []
    segments: list[SegmentGroup] = []
    for group in groups:
        spans += [(0, len(ids) + start, length) for start, length in group.image_spans]
        ids += group.prefix_ids
        labels += [IGNORE_INDEX] * len(group.prefix_ids)
        for branch in group.branches:
            ids += branch.input_ids
            labels += branch.labels
        segments.append(SegmentGroup(len(group.prefix_ids), tuple(len(branch.input_ids) for branch in group.branches)))
    for chain in chains:
        spans += [(0, len(ids) + start, length) for start, length in chain.image_spans]
        ids += chain.input_ids
        # The token before it in the row is another sample's.
        labels += [IGNORE_INDEX, *labels_of(chain)[1:]]
        segments.append(SegmentGroup(len(chain.input_ids)))
    row = {
        "input_ids": torch.tensor([ids], dtype=torch.long),
        "labels": torch.tensor([labels], dtype=torch.long),
        "image_spans": span_tensor(spans),
    }
    return row, Segments(tuple(segments))
