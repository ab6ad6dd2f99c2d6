"""Answers of a checkpoint in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from manyeyes.chat import BranchGroup
from manyeyes.connection import VisualTokens
from manyeyes.evaluation.scorecard import ModelKind
from manyeyes.model import load_checkpoint
from manyeyes.processor import CutImage
from manyeyes.runtime.bundle import GeneratedAnswer, Group

Disturb = Callable[[dict[str, torch.Tensor], Sequence[int]], dict[str, torch.Tensor]]


class TorchAnswerer:
    """Asks a checkpoint: encoders once an image, prefix keys and values once a group, greedy, fp32.

    Args:
        checkpoint: Its folder.
        threads: CPU threads; torch's own number when left out.
        device: For instance ``cuda``; by default CUDA where there is a device, else the CPU.
        max_branches: Most questions decoded at once; bounds the memory for copies of the prefix.

    Attributes:
        disturb: Changes the encoders' features before they are fused; ``None`` leaves them. (Features by encoder,
            ``[rows, C, h, w]``; rows of each image) to features of the same shapes. See ``reliance``.

    Raises:
        CheckpointError: The checkpoint is missing or incomplete.
    """

    name: ModelKind = "torch"

    def __init__(
        self, checkpoint: Path, *, threads: int | None = None, device: str | None = None, max_branches: int = 512
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, self.processor = load_checkpoint(checkpoint)
        self.model = model.to(device=self._device, dtype=torch.float32).eval()
        self._max_branches = max_branches
        self.disturb: Disturb | None = None

    @torch.inference_mode()
    def answer_groups(self, groups: Sequence[Group], *, max_new_tokens: int) -> list[list[GeneratedAnswer]]:
        """One list a group, one greedy answer a question, in order.

        Raises:
            RecordError: An image cannot be decoded, or a question is too long.
        """
        asking = [group for group in groups if group.questions]
        if not asking:
            return [[] for _ in groups]
        if len(asking) < len(groups):
            answered = iter(self.answer_groups(asking, max_new_tokens=max_new_tokens))
            return [next(answered) if group.questions else [] for group in groups]
        # The same image may stand in several groups; it is decoded and encoded once.
        cut = {data: self.processor.cut_image(data) for group in groups for data in group.images}
        encoded = [
            self.processor.encode_group(
                [(question, None) for question in group.questions],
                num_images=len(group.images),
                image_sizes=[cut[data].size for data in group.images],
            )
            for group in groups
        ]
        prefixes = self.processor.pad_groups([BranchGroup(each.prefix_ids, each.image_spans, ()) for each in encoded])
        prefix_mask = prefixes["prefix_mask"].to(self._device)
        images = [image for group in groups for image in group.images]
        cache = self.model.prefill_prefix(
            prefixes["prefix_ids"].to(self._device),
            prefix_mask,
            visual_tokens=self._visual_tokens(images, cut),
            image_spans=prefixes["image_spans"].to(self._device) if images else None,
        )
        # Questions of like length run together, so that little of a batch is padding.
        asked = sorted(
            ((row, place) for row, group in enumerate(encoded) for place in range(len(group.branches))),
            key=lambda which: len(encoded[which[0]].branches[which[1]].input_ids),
        )
        answers: dict[tuple[int, int], GeneratedAnswer] = {}
        for start in range(0, len(asked), self._max_branches):
            chunk = asked[start : start + self._max_branches]
            ids, mask = self._pad_branches([encoded[row].branches[place].input_ids for row, place in chunk])
            decoded = self.model.decode_branches(
                cache,
                prefix_mask,
                torch.tensor([row for row, _ in chunk], device=self._device),
                ids,
                mask,
                max_new_tokens=max_new_tokens,
                stop_token_ids=self.processor.stop_token_ids,
            )
            for which, token_ids in zip(chunk, decoded.token_ids, strict=True):
                answers[which] = GeneratedAnswer(self.processor.decode_answer(token_ids), tuple(token_ids))
        return [[answers[row, place] for place in range(len(group.branches))] for row, group in enumerate(encoded)]

    def _visual_tokens(
        self, images: Sequence[bytes], cut: Mapping[bytes, CutImage]
    ) -> torch.Tensor | VisualTokens | None:
        if not images:
            return None
        pixels = self.processor.normalize_images(list(cut.values()))
        sizes = self.processor.size_inputs([image.size for image in cut.values()])
        features = self.model.encoder_features({name: values.to(self._device) for name, values in pixels.items()})
        if self.disturb is not None:
            rows = [len(next(iter(image.tiles.values()))) for image in cut.values()]
            features = self.disturb(features, rows)
        tokens: torch.Tensor | VisualTokens = self.model.fuse(
            features, **{name: values.to(self._device) for name, values in sizes.items()}
        )
        places = {image: place for place, image in enumerate(cut)}
        return tokens[torch.tensor([places[image] for image in images], device=tokens.device)]

    def _pad_branches(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.processor.tokenizer.pad_token_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        return ids.to(self._device), mask.to(self._device)
