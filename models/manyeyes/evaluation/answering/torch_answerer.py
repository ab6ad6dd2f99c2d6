"""Answers of a checkpoint in PyTorch.

Multiple choice is decided from one prefill as ``runtime.decoding`` says. The visual tokens of a batch are taken apart
into those of each image and put together again, because a cache keeps images one by one, whatever batch they came in.

Shapes: I images, N visual tokens of the image that has most, D width of the language model; an image has N_i tokens,
M_i of which look back at it from inside the language model. Q branches, L branch tokens, R prefixes, P prefix tokens, V
vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from manyeyes.chat import BranchGroup
from manyeyes.evaluation.answering.answerers import AnsweredBatch, answer_in_turn
from manyeyes.evaluation.answering.encoder_cache import (
    EncoderCache,
    EncoderCacheSettings,
    FeatureSettings,
    ImageCounts,
)
from manyeyes.evaluation.scorecard import ModelKind
from manyeyes.fusion.cross_attention import VisualWindows
from manyeyes.model import BranchBatch, ManyEyesForConditionalGeneration, load_checkpoint
from manyeyes.model.connection import VisualTokens
from manyeyes.model.language_model import compute_logits
from manyeyes.runtime.bundle import GeneratedAnswer, Group
from manyeyes.runtime.decoding import OptionEncoder, OptionIds, leading_options
from manyeyes.runtime.preprocess import read_decoded_size
from manyeyes.runtime.tiling import NEWLINE
from manyeyes.runtime.vision import WINDOWS, ImageTokens
from manyeyes.training.features import FrozenFeatures, frozen_features

# What is kept for a trial is read by others with the same encoder.
_USES = 2.0


@torch.inference_mode()
def choose_branches(
    model: ManyEyesForConditionalGeneration,
    batch: BranchBatch,
    *,
    options: Sequence[OptionIds],
    batch_size: int,
) -> list[int]:
    """Choose between the options of each branch.

    Args:
        model: Made the cache.
        batch: The branches, which end where the model goes on, and their prefixes.
        options: Token ids of each branch's options; at least one each.
        batch_size: Most options a run, where first tokens do not decide.

    Returns:
        The place of each branch's chosen option.
    """
    asked = model.forward_branches(batch)
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
    output = model.forward_branches(BranchBatch(cache, mask, rows, ids[:, :-1], real[:, :-1]))
    assert output.last_hidden_state is not None
    logits = compute_logits(model.language_model, output.last_hidden_state)
    log_probabilities = logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    sums: list[float] = (log_probabilities * real[:, 1:]).sum(1).tolist()
    return sums


def _column(pairs: Sequence[tuple[int, int]], place: int, like: Tensor) -> Tensor:
    return torch.tensor([pair[place] for pair in pairs], dtype=torch.long, device=like.device)


@dataclass(frozen=True)
class ShownImage:
    """One image as the language model takes it.

    Attributes:
        tokens: ``[N_i, D]``.
        looks: ``[M_i]``, which of the tokens look back.
        windows: What those look at, M_i of them; ``None`` in a model that does not look back.
    """

    tokens: Tensor
    looks: Tensor
    windows: VisualWindows | None


def split_images(visual: Tensor | VisualTokens, lengths: Sequence[int]) -> list[ShownImage]:
    """Take a batch apart.

    Args:
        visual: ``[I, N, D]``.
        lengths: N_i of each image.
    """
    if not isinstance(visual, VisualTokens):
        nothing = torch.zeros(0, dtype=torch.long, device=visual.device)
        return [ShownImage(tokens[:length], nothing, None) for tokens, length in zip(visual, lengths, strict=True)]
    images = []
    for tokens, cells, length in zip(visual.tokens, visual.cells, lengths, strict=True):
        looks = (cells[:length] != NEWLINE).nonzero().squeeze(1)
        images.append(ShownImage(tokens[:length], looks, visual.windows.select(cells[looks])))
    return images


def join_images(images: Sequence[ShownImage]) -> Tensor | VisualTokens:
    """Put images together, ``[I, N, D]``; shorter ones end with zeros that stand nowhere.

    Args:
        images: At least one; all of one model.
    """
    tokens = torch.nn.utils.rnn.pad_sequence([image.tokens for image in images], batch_first=True)
    windows = [image.windows for image in images if image.windows is not None]
    if not windows:
        return tokens
    cells = torch.full(tokens.shape[:2], NEWLINE, dtype=torch.long, device=tokens.device)
    first = 0
    for row, image in zip(cells, images, strict=True):
        row[image.looks] = torch.arange(first, first + len(image.looks), device=tokens.device)
        first += len(image.looks)
    joined = VisualWindows(
        keys=torch.cat([own.keys for own in windows]),
        mask=torch.cat([own.mask for own in windows]),
        overall=torch.cat([own.overall for own in windows]),
    )
    return VisualTokens(tokens=tokens, windows=joined, cells=cells)


def to_arrays(image: ShownImage) -> ImageTokens:
    """In host memory, as a cache keeps it and as a bundle has it."""
    windows = {}
    if image.windows is not None:
        values = (image.windows.keys, image.windows.mask, image.windows.overall)
        windows = {name: value.cpu().numpy() for name, value in zip(WINDOWS, values, strict=True)}
    return ImageTokens(image.tokens.cpu().numpy(), image.looks.cpu().numpy(), windows)


def from_arrays(image: ImageTokens, device: torch.device) -> ShownImage:
    """Back on a device; bit for bit what ``to_arrays`` was given."""

    def load(array: np.ndarray) -> Tensor:
        # Copied: memory of a cache is not to be written, and torch warns of arrays that cannot be.
        return torch.tensor(array, device=device)

    windows = None
    if image.windows:
        windows = VisualWindows(*(load(np.asarray(image.windows[name])) for name in WINDOWS))
    return ShownImage(load(image.tokens), load(image.looks), windows)


Disturb = Callable[[dict[str, torch.Tensor], Sequence[int]], dict[str, torch.Tensor]]


class TorchAnswerer:
    """Asks a checkpoint: encoders once an image, prefix keys and values once a group, greedy, fp32.

    Args:
        checkpoint: Its folder.
        threads: CPU threads; torch's own number when left out.
        device: For instance ``cuda``; by default CUDA where there is a device, else the CPU.
        max_branches: Most questions decoded at once; bounds the memory for copies of the prefix.
        encoder_cache: Keeps visual tokens; every image is encoded anew without.
        features: Which encoders' features are kept for other models too; none without.

    Attributes:
        disturb: Changes the encoders' features before they are fused; ``None`` leaves them. (Features by encoder,
            ``[rows, C, h, w]``; rows of each image) to features of the same shapes. See ``reliance``. While it is set,
            no cache is asked or filled.

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
        features: FeatureSettings | None = None,
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
        self._frozen: FrozenFeatures | None = None
        if features is not None:
            for name, encoder in self.model.encoders.items():
                encoder.requires_grad_(name not in features.encoders)
            self._frozen = frozen_features(
                self.model,
                self.processor,
                precision="fp32",
                folder=features.folder,
                images=features.images,
                uses=_USES,
                device=self._device,
                code_digest=features.code_digest,
                tell=True,
            )

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

        def batch_of(chunk: Sequence[tuple[int, int]]) -> BranchBatch:
            ids, mask = self._pad_branches([encoded[row].branches[place].input_ids for row, place in chunk])
            return BranchBatch(
                prefix_cache=cache,
                prefix_mask=prefix_mask,
                rows=torch.tensor([row for row, _ in chunk], device=self._device),
                input_ids=ids,
                attention_mask=mask,
            )

        answers: dict[tuple[int, int], GeneratedAnswer] = {}
        for chunk in self._chunks([which for which in asked if not groups[which[0]].options(which[1])]):
            decoded = self.model.decode_branches(
                batch_of(chunk), max_new_tokens=max_new_tokens, stop_token_ids=self.processor.stop_token_ids
            )
            for which, token_ids in zip(chunk, decoded.token_ids, strict=True):
                answers[which] = GeneratedAnswer(self.processor.decode_answer(token_ids), tuple(token_ids))
        for chunk in self._chunks([which for which in asked if groups[which[0]].options(which[1])]):
            chosen = choose_branches(
                self.model,
                batch_of(chunk),
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
        if self._frozen is not None and self.disturb is None:
            return self._encode_apart(images, self._frozen)
        cut = [self.processor.cut_image(data) for data in images]
        pixels = self.processor.normalize_images(cut)
        image_sizes = [image.size for image in cut]
        features = self.model.encoder_features({name: values.to(self._device) for name, values in pixels.items()})
        if self.disturb is not None:
            rows = [len(next(iter(image.tiles.values()))) for image in cut]
            features = self.disturb(features, rows)
        return self._fuse(images, features, image_sizes)

    def _encode_apart(self, images: Sequence[bytes], frozen: FrozenFeatures) -> dict[bytes, ShownImage]:
        """The same, where features of encoders that do not train are kept."""
        features = frozen.complete([frozen.reader.show(image, self.processor) for image in images])
        # A trial that is killed loses one batch's; what another one has made meanwhile is not written again.
        frozen.write()
        others = [name for name in self.model.encoders if name not in features]
        if others:
            cut = [self.processor.cut_image(image, names=frozen.reader.live) for image in images]
            pixels = {name: values.to(self._device) for name, values in self.processor.normalize_images(cut).items()}
            features |= self.model.encoder_features(pixels, names=others)
        matters = self.processor.layout is not None or self.processor.sends_image_sizes
        return self._fuse(images, features, [read_decoded_size(image) if matters else (0, 0) for image in images])

    def _fuse(
        self, images: Sequence[bytes], features: Mapping[str, Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> dict[bytes, ShownImage]:
        sizes = self.processor.size_inputs(image_sizes)
        visual = self.model.fuse(features, **{name: values.to(self._device) for name, values in sizes.items()})
        lengths = self.processor.count_tokens(len(images), image_sizes)
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
