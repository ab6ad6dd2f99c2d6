"""From images and conversations to one batch for the model; saved and loaded beside it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from manyeyes.chat import IGNORE_INDEX, BranchGroup, find_chat_template, labels_of, question_with_images, split_branches
from manyeyes.errors import RecordError
from manyeyes.runtime.chat import (
    IMAGE_PLACEHOLDER,
    ChatTemplate,
    Encoded,
    encode_conversation,
    render_turns,
    stop_token_ids,
)
from manyeyes.runtime.preprocess import ImageTransform, decode_image, normalize_pixels
from manyeyes.runtime.tiling import TokenLayout, arrange_images, arrange_tokens, tile_image

Image = bytes | NDArray[np.uint8]
"""An image file's bytes, or decoded pixels ``[H, W, 3]``."""

Images = Sequence[Image] | Sequence[Sequence[Image]] | Image | None
"""Images of a batch: a list per conversation, one flat list, one image, or none."""

Conversation = Sequence[tuple[str, str]]
"""Speaker (``human`` or ``gpt``) and text of each turn."""


def count_placeholders(conversation: Conversation) -> int:
    """How many images a conversation asks for."""
    return sum(text.count(IMAGE_PLACEHOLDER) for speaker, text in conversation if speaker == "human")


def from_questions(questions: Sequence[str], images: Images) -> tuple[list[Conversation], Images]:
    """Questions as conversations, and their images, with a placeholder for each.

    Raises:
        RecordError: Several questions, and not as many lists of images.
    """
    if any(IMAGE_PLACEHOLDER in question for question in questions):
        return [[("human", question)] for question in questions], images
    nested = _nest(images)
    if len(questions) == 1:
        nested = [[image for own in nested for image in own]]
    elif not nested:
        nested = [[] for _ in questions]
    if len(nested) != len(questions):
        raise RecordError(
            f"{len(questions)} questions and images for {len(nested)}",
            "as many lists of images as questions are needed",
            "Give each question its own list of images, or put <image> into the questions.",
        )
    turns: list[Conversation] = [
        [("human", question_with_images(question, num_images=len(own)))]
        for question, own in zip(questions, nested, strict=True)
    ]
    return turns, nested


def _nest(images: Images) -> list[list[Image]]:
    """One list a conversation; an image alone stands in a list of its own."""
    if images is None:
        return []
    if isinstance(images, bytes | np.ndarray):
        return [[images]]
    return [[image] if isinstance(image, bytes | np.ndarray) else list(image) for image in images]


def flatten(images: Images, counts: Sequence[int]) -> list[Image]:
    """All images in order.

    Args:
        images: As the processor takes them.
        counts: Placeholders of each conversation.

    Raises:
        RecordError: Placeholders and images differ in number.
    """
    nested = _nest(images)
    flat = [image for own in nested for image in own]
    # Lists of images belong to their conversations; a flat list goes by placeholders.
    own_lists = isinstance(images, list | tuple) and bool(images) and isinstance(images[0], list | tuple)
    if len(flat) != sum(counts) or (own_lists and [len(own) for own in nested] != list(counts)):
        found = [len(own) for own in nested] if own_lists else len(flat)
        raise RecordError(
            f"conversations have {list(counts)} {IMAGE_PLACEHOLDER} and {found} images",
            "one placeholder per image is needed",
            "Fix the conversations or the images.",
        )
    return flat


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


PIXELS = "pixel_values."
SHARED = "shared"
"""Name of the pixels that every encoder's input is made from, in a model with ``preprocess: shared``."""


@dataclass(frozen=True)
class CutImage:
    """An image that is ready but for normalisation; small enough to keep.

    Attributes:
        size: Width and height of the decoded image, in pixels.
        tiles: ``[tiles, size, size, 3]``, uint8, by the name of the pixels.
    """

    size: tuple[int, int]
    tiles: Mapping[str, NDArray[np.uint8]]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(array.nbytes for array in self.tiles.values())


class ManyEyesProcessor(ProcessorMixin):
    """Images and conversations to a batch; saved and loaded with the model.

    Attributes:
        tokenizer: The language model's.
        transforms: How each encoder wants its pixels, by encoder name; ``ImageTransform.as_dict`` values. A model
            that makes every encoder's pixels from one tensor has a single entry, ``shared``.
        template: Name of the chat template; ``tokenizer`` for the tokenizer's own.
        system: Replaces the template's system text; None keeps it.
        num_image_tokens: Visual tokens an image; with a layout, a tile.
        image_token_id: Id that stands where visual tokens go.
        max_length: Tokens a conversation may have, image tokens included.
        layout: How an image becomes tiles and its tokens a sequence, as ``TokenLayout.as_dict``; None for one tile,
            its tokens as they are.
        sends_image_sizes: Whether batches hold ``image_sizes``, for a fusion that masks padding.
        image_marks: Text before and after each image, instead of the template's own; None keeps those.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        transforms: Mapping[str, Mapping[str, Any]],
        template: str,
        num_image_tokens: int,
        image_token_id: int,
        max_length: int,
        system: str | None = None,
        chat_template: str | None = None,
        layout: Mapping[str, Any] | None = None,
        sends_image_sizes: bool = False,
        image_marks: Sequence[str] | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.transforms = {name: dict(values) for name, values in transforms.items()}
        self.template = template
        self.system = system
        self.num_image_tokens = num_image_tokens
        self.image_token_id = image_token_id
        self.max_length = max_length
        self.layout = None if layout is None else dict(layout)
        self.sends_image_sizes = sends_image_sizes
        self._layout = None if layout is None else TokenLayout.from_dict(layout)
        self._template = find_chat_template(template, tokenizer)
        self.image_marks = None if image_marks is None else list(image_marks)
        if self.image_marks is not None:
            before, after = self.image_marks
            self._template = replace(self._template, image_prefix=before, image_suffix=after)
        # A system text that the template has no place for is refused here, before any record is read.
        render_turns(self._template, [("human", "")], system=system, generation_prompt=True)
        self._transforms = {name: ImageTransform.from_dict(values) for name, values in self.transforms.items()}

    @property
    def model_input_names(self) -> list[str]:
        """Keys of a batch."""
        names = ["input_ids", "attention_mask", "image_spans", *(PIXELS + name for name in self.transforms)]
        return [*names, *self._size_inputs]

    @property
    def _size_inputs(self) -> list[str]:
        return ["layout"] * (self._layout is not None) + ["image_sizes"] * self.sends_image_sizes

    @property
    def rust_tokenizer(self) -> Tokenizer:
        """The tokenizer as a bundle runs it."""
        backend: Tokenizer = self.tokenizer.backend_tokenizer
        return backend

    @property
    def image_transforms(self) -> dict[str, ImageTransform]:
        """How each encoder wants its pixels, by encoder name."""
        return dict(self._transforms)

    @property
    def conversation_template(self) -> ChatTemplate:
        """The text around turns."""
        return self._template

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer."""
        return stop_token_ids(self.rust_tokenizer, self._template)

    def __call__(
        self,
        images: Images = None,
        text: str | Sequence[str] | None = None,
        conversations: Sequence[Conversation] | None = None,
        *,
        padding_side: Literal["left", "right"] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Make a batch.

        Args:
            images: Per conversation a list of images; one flat list goes to the conversations by their number of
                ``<image>`` placeholders, in order.
            text: Questions to answer, instead of conversations. A question without ``<image>`` gets one per image in
                front; with several questions every one must then have its own list of images.
            conversations: Turns. Those that end with a human turn get a generation prompt and no labels.
            padding_side: ``left`` by default for generation, ``right`` by default for training.
            return_tensors: ``pt`` only.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[B, T]``; ``labels`` ``[B, T]`` when every conversation ends with
            an answer; with images also ``image_spans`` ``[I, 4]`` (row, start, length, image) and
            ``pixel_values.<encoder>`` ``[I, 3, size, size]`` for each encoder, or one a tile and ``layout`` ``[I, M]``;
            ``image_sizes`` ``[I, 2]`` where the fusion masks padding.

        Raises:
            RecordError: Placeholders and images differ in number, an image cannot be decoded, turns do not alternate,
                or a conversation is longer than ``max_length``.
        """
        if return_tensors != "pt":
            raise ValueError(f'return_tensors is "{return_tensors}"; only "pt" is made')
        if (text is None) == (conversations is None):
            raise ValueError("give either text or conversations")
        if text is not None:
            questions = [text] if isinstance(text, str) else list(text)
            conversations, images = from_questions(questions, images)
        assert conversations is not None
        counts = [count_placeholders(conversation) for conversation in conversations]
        cut = [self.cut_image(image) for image in flatten(images, counts)]
        sizes = [image.size for image in cut]
        firsts = np.cumsum([0, *counts]).tolist()
        encoded = [
            self.encode(turns, num_images=count, image_sizes=sizes[first : first + count])
            for turns, count, first in zip(conversations, counts, firsts, strict=False)
        ]
        trains = all(turns and turns[-1][0] == "gpt" for turns in conversations)
        batch = self.pad(encoded, side=padding_side or ("right" if trains else "left"), labels=trains)
        if cut:
            batch.update({PIXELS + name: pixels for name, pixels in self.normalize_images(cut).items()})
            batch.update(self.size_inputs(sizes))
        else:
            del batch["image_spans"]
        return BatchFeature(batch)

    def size_inputs(self, image_sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """What the model must know of images' sizes, besides pixels.

        Args:
            image_sizes: Width and height of each image, in pixels.

        Returns:
            ``layout`` ``[I, M]`` with a layout, ``image_sizes`` ``[I, 2]`` where the fusion masks padding.

        Raises:
            RecordError: Unpadding leaves nothing of an image.
        """
        inputs = {}
        if self._layout is not None:
            layout, _ = arrange_images(image_sizes, self._layout, grid=math.isqrt(self.num_image_tokens))
            inputs["layout"] = torch.from_numpy(layout)
        if self.sends_image_sizes:
            inputs["image_sizes"] = torch.tensor(image_sizes, dtype=torch.long)
        return inputs

    def _arrange(self, size: tuple[int, int]) -> NDArray[np.int64]:
        assert self._layout is not None
        return arrange_tokens(*size, self._layout, grid=math.isqrt(self.num_image_tokens))

    def count_tokens(self, num_images: int, image_sizes: Sequence[tuple[int, int]] | None) -> list[int]:
        """Visual tokens of each image.

        Args:
            num_images: How many images.
            image_sizes: Width and height of each; needed with a layout.

        Raises:
            RecordError: A layout, and no sizes.
        """
        if self._layout is None or num_images == 0:
            return [self.num_image_tokens] * num_images
        if image_sizes is None:
            raise RecordError("images without their sizes", "this model's layout depends on them", "Pass image_sizes.")
        return [len(self._arrange(size)) for size in image_sizes]

    def count_tiles(self, image_sizes: Sequence[tuple[int, int]]) -> int:
        """What encoders see of images: as many, or all their tiles.

        Args:
            image_sizes: Width and height of each; any without a layout.
        """
        if self._layout is None:
            return len(image_sizes)
        return sum(self._layout.num_tiles(*size) for size in image_sizes)

    def encode(
        self,
        turns: Conversation,
        *,
        num_images: int,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        image_tokens: Sequence[int] | None = None,
        too_long: Literal["refuse", "cut"] = "refuse",
    ) -> Encoded:
        """Tokenise one conversation; one that ends with a human turn gets a generation prompt.

        Args:
            turns: Speaker and text of each turn, with ``<image>`` placeholders.
            num_images: How many images go with it.
            image_sizes: Width and height of each; needed with a layout.
            image_tokens: Visual tokens of each, where they are known; the sizes are not needed then.
            too_long: What becomes of more than ``max_length`` tokens; ``cut`` leaves the end out.

        Raises:
            RecordError: Turns do not alternate, placeholders and images differ in number, or it is too long; also to be
                cut within or before an image.
        """
        encoded = encode_conversation(
            self.rust_tokenizer,
            self._template,
            turns,
            image_tokens=self.count_tokens(num_images, image_sizes) if image_tokens is None else image_tokens,
            image_token_id=self.image_token_id,
            system=self.system,
            generation_prompt=bool(turns) and turns[-1][0] == "human",
        )
        if too_long == "cut" and encoded.prefix_length <= self.max_length:
            return replace(
                encoded,
                input_ids=encoded.input_ids[: self.max_length],
                supervised=encoded.supervised[: self.max_length],
            )
        if len(encoded.input_ids) > self.max_length:
            raise RecordError(
                f"conversation has {len(encoded.input_ids)} tokens",
                f"at most {self.max_length} are allowed",
                "Shorten it, or raise model.language_model.max_length in the recipe.",
            )
        return encoded

    def encode_group(
        self,
        pairs: Sequence[tuple[str, str | None]],
        *,
        num_images: int,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        image_tokens: Sequence[int] | None = None,
    ) -> BranchGroup:
        """Tokenise questions about the same images, each seeing the images and itself alone.

        Args:
            pairs: Question and answer; None instead of an answer asks for one. Questions carry no ``<image>``.
            num_images: How many images they are about; 0 for none.
            image_sizes: Width and height of each; needed with a layout.
            image_tokens: Visual tokens of each, where they are known; the sizes are not needed then.

        Raises:
            RecordError: As ``encode``, or the template leaves nothing between image and answer.
        """
        conversations = []
        for question, answer in pairs:
            turns = [("human", question_with_images(question, num_images=num_images))]
            if answer is not None:
                turns.append(("gpt", answer))
            conversations.append(
                self.encode(turns, num_images=num_images, image_sizes=image_sizes, image_tokens=image_tokens)
            )
        return split_branches(conversations)

    def pixel_values(self, images: Sequence[Image], *, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Pixels for every encoder; each image is decoded once.

        Args:
            images: Image files or decoded pixels.
            names: Of the pixels to make; all by default.

        Returns:
            Per encoder name ``[I, 3, size, size]``, float32; with tiles, those of all images one after the other.

        Raises:
            RecordError: An image cannot be decoded.
        """
        return self.normalize_images([self.cut_image(image, names=names) for image in images])

    def cut_image(self, image: Image, *, names: Sequence[str] | None = None) -> CutImage:
        """Decode an image, and resize and cut it for every encoder: all of ``pixel_values`` but ``normalize_images``.

        Args:
            image: Image file or decoded pixels.
            names: Of the pixels to make; all by default.

        Raises:
            RecordError: It cannot be decoded.
        """
        decoded, layout = _decode(image), self._layout or TokenLayout()
        return CutImage(
            size=(decoded.shape[1], decoded.shape[0]),
            tiles={
                name: tile_image(decoded, transform, layout, encoder=name)
                for name, transform in self._transforms.items()
                if names is None or name in names
            },
        )

    def normalize_images(self, images: Sequence[CutImage]) -> dict[str, Tensor]:
        """Pixels of images that ``cut_image`` made: ``pixel_values`` of the same images, bit for bit."""
        return {
            name: torch.from_numpy(
                normalize_pixels(np.concatenate([image.tiles[name] for image in images]), self._transforms[name])
            )
            for name in images[0].tiles
        }

    def pad(self, encoded: Sequence[Encoded], *, side: Literal["left", "right"], labels: bool) -> dict[str, Tensor]:
        """Pad conversations to one length.

        Args:
            encoded: Tokenised conversations.
            side: Where padding goes.
            labels: Whether to make ``labels``.

        Returns:
            ``input_ids``, ``attention_mask`` and, if asked for, ``labels``, ``[B, T]``; ``image_spans`` ``[I, 4]``.
        """
        return pad_conversations(encoded, pad_id=self.tokenizer.pad_token_id, side=side, labels=labels)

    def pad_groups(self, groups: Sequence[BranchGroup]) -> dict[str, Tensor]:
        """Pad groups for ``prefill_prefix`` and ``forward_branches``.

        Args:
            groups: Tokenised questions about the same images; image order over all groups is the order of
                ``visual_tokens``.

        Returns:
            ``prefix_ids`` and ``prefix_mask`` ``[R, P]``, padded on the left; ``image_spans`` ``[I, 4]``; ``rows``
            ``[Q]``, each branch's prefix; ``input_ids``, ``attention_mask`` and ``labels`` ``[Q, L]``, padded on the
            right.
        """
        return pad_branch_groups(groups, pad_id=self.tokenizer.pad_token_id)

    def decode_answer(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, without special tokens and surrounding white space."""
        return self.rust_tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()


def _decode(image: Image) -> NDArray[np.uint8]:
    return decode_image(image) if isinstance(image, bytes) else image
