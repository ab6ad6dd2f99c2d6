"""Answers of a checkpoint in PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from manyeyes.chat import BranchGroup
from manyeyes.evaluation.answering.answerers import AnsweredBatch, answer_in_turn
from manyeyes.evaluation.answering.encoder_cache import EncoderCache, EncoderCacheSettings, ImageCounts
from manyeyes.evaluation.answering.torch_choosing import choose_branches
from manyeyes.evaluation.answering.torch_images import ShownImage, from_arrays, join_images, split_images, to_arrays
from manyeyes.evaluation.scorecard import ModelKind
from manyeyes.model import load_checkpoint
from manyeyes.runtime.bundle import GeneratedAnswer, Group
from manyeyes.runtime.choosing import OptionEncoder, OptionIds

Disturb = Callable[[dict[str, torch.Tensor], Sequence[int]], dict[str, torch.Tensor]]


class TorchAnswerer:
    """Asks a checkpoint: encoders once an image, prefix keys and values once a group, greedy, fp32.

    Args:
        checkpoint: Its folder.
        threads: CPU threads; torch's own number when left out.
        device: For instance ``cuda``; by default CUDA where there is a device, else the CPU.
        max_branches: Most questions decoded at once; bounds the memory for copies of the prefix.
        encoder_cache: Keeps visual tokens; every image is encoded anew without.

    Attributes:
        disturb: Changes the encoders' features before they are fused; ``None`` leaves them. (Features by encoder,
            ``[rows, C, h, w]``; rows of each image) to features of the same shapes. See ``reliance``. While it is set,
            the cache is neither asked nor filled.

    Raises:
        CheckpointError: The checkpoint is missing or incomplete.
    """

    name: ModelKind = "torch"

    def __init__(
        self,
        checkpoint: Path,
        *,
        threads: int | None = None,
        device: str | None = None,
        max_branches: int = 512,
        encoder_cache: EncoderCacheSettings | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, self.processor = load_checkpoint(checkpoint)
        self.model = model.to(device=self._device, dtype=torch.float32).eval()
        self._max_branches = max_branches
        self._options = OptionEncoder(
            self.processor.rust_tokenizer,
            self.processor.conversation_template,
            system=self.processor.system,
            max_length=self.processor.max_length,
        )
        self.disturb: Disturb | None = None
        self._encoder_cache = None if encoder_cache is None else EncoderCache(encoder_cache)

    @property
    def image_counts(self) -> ImageCounts:
        """Images shown since it was made, by where their visual tokens came from; all 0 without a cache."""
        return ImageCounts() if self._encoder_cache is None else self._encoder_cache.counts

    def answer_batches(self, batches: Iterable[Sequence[Group]], *, max_new_tokens: int) -> Iterator[AnsweredBatch]:
        """Answer one batch after the other."""
        return answer_in_turn(self, batches, max_new_tokens=max_new_tokens)

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
        shown = self._show(list(dict.fromkeys(data for group in groups for data in group.images)))
        encoded = [
            self.processor.encode_group(
                [(question, None) for question in group.questions],
                num_images=len(group.images),
                image_tokens=[len(shown[data].tokens) for data in group.images],
            )
            for group in groups
        ]
        prefixes = self.processor.pad_groups([BranchGroup(each.prefix_ids, each.image_spans, ()) for each in encoded])
        prefix_mask = prefixes["prefix_mask"].to(self._device)
        images = [shown[data] for group in groups for data in group.images]
        cache = self.model.prefill_prefix(
            prefixes["prefix_ids"].to(self._device),
            prefix_mask,
            visual_tokens=join_images(images) if images else None,
            image_spans=prefixes["image_spans"].to(self._device) if images else None,
        )
        # Questions of like length run together, so that little of a batch is padding.
        asked = sorted(
            ((row, place) for row, group in enumerate(encoded) for place in range(len(group.branches))),
            key=lambda which: len(encoded[which[0]].branches[which[1]].input_ids),
        )
        answers: dict[tuple[int, int], GeneratedAnswer] = {}
        for chunk in self._chunks([which for which in asked if not groups[which[0]].options(which[1])]):
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
        for chunk in self._chunks([which for which in asked if groups[which[0]].options(which[1])]):
            ids, mask = self._pad_branches([encoded[row].branches[place].input_ids for row, place in chunk])
            chosen = choose_branches(
                self.model,
                cache,
                prefix_mask,
                torch.tensor([row for row, _ in chunk], device=self._device),
                ids,
                mask,
                options=[self._encode_options(groups[row], place, encoded[row]) for row, place in chunk],
                batch_size=self._max_branches,
            )
            for (row, place), option in zip(chunk, chosen, strict=True):
                answers[row, place] = GeneratedAnswer(groups[row].options(place)[option], ())
        return [[answers[row, place] for place in range(len(group.branches))] for row, group in enumerate(encoded)]

    def _show(self, images: Sequence[bytes]) -> dict[bytes, ShownImage]:
        """What the language model takes of each image, from the cache where it is there."""
        cache = None if self.disturb is not None else self._encoder_cache
        if cache is None:
            return self._encode(images)
        shown = {}
        for image in images:
            kept = cache.find(image)
            if kept is not None:
                shown[image] = from_arrays(kept, self._device)
        missing = [image for image in images if image not in shown]
        started = time.perf_counter()
        encoded = self._encode(missing)
        arrays = {image: to_arrays(tokens) for image, tokens in encoded.items()}
        seconds = (time.perf_counter() - started) / max(len(missing), 1)
        for image, tokens in arrays.items():
            cache.keep(image, tokens, seconds=seconds)
        return shown | encoded

    def _encode(self, images: Sequence[bytes]) -> dict[bytes, ShownImage]:
        if not images:
            return {}
        cut = [self.processor.cut_image(data) for data in images]
        pixels = self.processor.normalize_images(cut)
        image_sizes = [image.size for image in cut]
        sizes = self.processor.size_inputs(image_sizes)
        features = self.model.encoder_features({name: values.to(self._device) for name, values in pixels.items()})
        if self.disturb is not None:
            rows = [len(next(iter(image.tiles.values()))) for image in cut]
            features = self.disturb(features, rows)
        visual = self.model.fuse(features, **{name: values.to(self._device) for name, values in sizes.items()})
        lengths = self.processor.count_tokens(len(cut), image_sizes)
        return dict(zip(images, split_images(visual, lengths), strict=True))

    def _chunks(self, asked: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
        for start in range(0, len(asked), self._max_branches):
            yield asked[start : start + self._max_branches]

    def _encode_options(self, group: Group, place: int, encoded: BranchGroup) -> OptionIds:
        return self._options.encode(
            group.questions[place],
            group.options(place),
            num_images=len(group.images),
            prompt_length=len(encoded.prefix_ids) + len(encoded.branches[place].input_ids),
        )

    def _pad_branches(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.processor.tokenizer.pad_token_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        return ids.to(self._device), mask.to(self._device)
