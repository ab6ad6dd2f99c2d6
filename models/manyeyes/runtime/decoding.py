"""Greedy answers, and choices between options, from a key-value cache shared by all questions about the same images.

Shapes: R prefixes of at most P tokens, Q questions of at most L tokens, width D, vocabulary V. Prefixes and questions
are padded on the left, so a row of the cache reads ``[padding prefix padding question answer]`` and the attention mask
has holes. Positions count tokens, not slots, so padding changes no result.

Multiple choice comes from one prefill: the option whose first token is the likeliest is the answer. This is another
protocol than reading a written answer: a model that would have written something else is held to the options, and no
answer is unreadable. Options that begin with the same token are told apart by the log-probabilities of all their
tokens, the end of the turn included, so that "1" can win against "10".

Greedy decoding that may only write options would start the same way; both back ends (this one, and
``evaluation.answering.torch_answerer``) decide here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

from manyeyes.errors import BundleError, RecordError
from manyeyes.runtime.chat import IMAGE_PLACEHOLDER, ChatTemplate, encode_answers, stop_token_ids
from manyeyes.runtime.sessions import Graph
from manyeyes.runtime.vision import PLACES, WINDOWS, ImageTokens

OptionIds = tuple[tuple[int, ...], ...]
"""Token ids of each option behind its question, the end of the turn included."""

_KEPT = 4096

KEPT, _OLD_KEPT = "num_logits_to_keep", "logits_positions"
"""Input of the decoder: of how many of the last positions logits are wanted; in older bundles, of which positions."""

CACHE_PROPERTY, TAKES_BUFFER = "manyeyes.cache", "buffer"
"""Property of a decoder's graph that writes new keys and values into the memory of those before, where there is room:
its mask then is as long as that memory."""

# Slots that a cache gets for tokens to come: at least so many, and a share of those in use. Attention reads them all.
_ROOM, _ROOM_SHARE = 16, 8


# Given tokens that run at once, by device. Attention's scores are tokens x tokens: those of a few stay in a processor's
# cache, and reach no further than the last of them. A GPU wants more to do at once.
_PIECES = {"cpu": 128, "cuda": 1024}


class OptionEncoder:
    """Tokenises options behind the question that they belong to; equal questions once.

    Args:
        tokenizer: The language model's.
        template: The text around turns.
        system: Replaces the template's system text; an empty text leaves it out.
        max_length: Tokens that the model can take, question and answer together.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, *, system: str | None, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._system = system
        self._max_length = max_length
        self._stop_ids = stop_token_ids(tokenizer, template)
        self._encode = lru_cache(maxsize=_KEPT)(self._encode_options)

    def encode(self, question: str, options: tuple[str, ...], *, num_images: int, prompt_length: int) -> OptionIds:
        """Token ids of each option.

        Args:
            question: Without ``<image>``.
            options: What may be answered.
            num_images: How many images stand in front of the question.
            prompt_length: Tokens of the prompt, images included.

        Raises:
            RecordError: Prompt and option are longer than the model allows.
            RecipeError: The tokenizer joins the end of the prompt with an option.
        """
        encoded = self._encode(question, options, num_images)
        # The end of the turn is looked for and never fed.
        longest = prompt_length + max(len(ids) for ids in encoded) - 1
        if longest > self._max_length:
            raise RecordError(
                f"question {question[:60]!r} with its images and its longest option is {longest} tokens long",
                f"at most {self._max_length} are allowed",
                "Shorten it, or show fewer images.",
            )
        return encoded

    def _encode_options(self, question: str, options: tuple[str, ...], num_images: int) -> OptionIds:
        turns = [("human", f"{IMAGE_PLACEHOLDER}\n" * num_images + question)]
        encoded = encode_answers(
            self._tokenizer, self._template, turns, options, stop_ids=self._stop_ids, system=self._system
        )
        return tuple(tuple(ids) for ids in encoded)


def check_choices(questions: Sequence[str], choices: Sequence[Sequence[str]]) -> None:
    """Check that there are options for every question or for none, and that they can be told apart.

    Raises:
        RecordError: Another number of entries than questions, or a question with an empty option or two equal ones.
    """
    if choices and len(choices) != len(questions):
        raise RecordError(
            f"{len(questions)} questions have {len(choices)} lists of options",
            "one list a question (an empty one where the answer is free), or none at all",
            "Fix choices.",
        )
    for question, options in zip(questions, choices, strict=False):
        stripped = [option.strip() for option in options]
        if "" in stripped or len(set(stripped)) < len(stripped):
            raise RecordError(
                f"question {question[:60]!r} has the options {list(options)}",
                "options that are not empty and that differ",
                "Fix choices.",
            )


def leading_options(scores: Sequence[float], options: Sequence[Sequence[int]]) -> list[int]:
    """Places of the options that share the likeliest first token; of equally likely ones the first option's.

    Args:
        scores: Logit of each option's first token.
        options: Token ids of each option.
    """
    best = max(range(len(options)), key=lambda place: scores[place])
    return [place for place, ids in enumerate(options) if ids[0] == options[best][0]]


_ON_HOST = ("logits",)


@dataclass(frozen=True)
class Prefixes:
    """Prefixes that have run through the decoder.

    Attributes:
        cache: Keys and values by input name, ``[R, heads, P, D / heads]`` each.
        mask: ``[R, P]``, int64; 0 at padding.
    """

    cache: Mapping[str, ort.OrtValue]
    mask: NDArray[np.int64]


@dataclass(frozen=True)
class Continuation:
    """What greedy decoding wrote after one prompt.

    Attributes:
        token_ids: New tokens, without the stop token.
        first_logits: ``[V]``, float32, at the first new token.
    """

    token_ids: tuple[int, ...]
    first_logits: NDArray[np.float32]


@dataclass(frozen=True)
class Choice:
    """Which option a model holds for the likeliest.

    Attributes:
        option: Its place among the options.
        first_logits: ``[V]``, float32, behind the prompt.
    """

    option: int
    first_logits: NDArray[np.float32]


class Decoder:
    """The graphs of the embedding table and of the language model.

    Args:
        embed: Token ids to embeddings.
        decoder: Embeddings, mask, positions, cache and what visual tokens look at to logits and cache.
        prefill: As ``decoder``, for tokens that are given; by default the same. Which of the two a token runs through
            does not depend on how many run with it, so a batch changes no answer.
        stop_ids: Tokens that end an answer.

    Raises:
        BundleError: The graphs take or give something else.
    """

    def __init__(self, embed: Graph, decoder: Graph, prefill: Graph | None = None, *, stop_ids: Sequence[int]) -> None:
        self._embed = embed
        self._decoder = decoder
        self._prefill = prefill or decoder
        self._stop_ids = frozenset(stop_ids)
        self._kept = _OLD_KEPT if _OLD_KEPT in decoder.input_names else KEPT
        self._cache_names = [name for name in decoder.input_names if name.startswith("past_key_values.")]
        self._piece = _PIECES[decoder.device]
        self._takes_buffer = decoder.properties.get(CACHE_PROPERTY) == TAKES_BUFFER
        self._check()
        # What a step without images looks at.
        self._no_looks = _no_looks(decoder) if PLACES in decoder.input_names else {}

    def _check(self) -> None:
        width = self._embed.sizes("inputs_embeds", rank=3, fixed=(2,))
        taken = self._decoder.sizes("inputs_embeds", rank=3, fixed=(2,))
        if width != taken:
            raise BundleError(
                f"{self._embed.name} makes embeddings of {width[0]}", f"{taken[0]} are needed", "Export it again."
            )
        self._embed.shape("input_ids", rank=2)
        self._decoder.shape("logits", rank=3)
        for name in self._cache_names:
            present = name.replace("past_key_values.", "present.")
            taken, given = (self._decoder.sizes(each, rank=4, fixed=(1, 3)) for each in (name, present))
            if taken != given:
                raise BundleError(f"{name} has sizes {taken}", f"{present} has {given}", "Export the bundle again.")
        known = {"inputs_embeds", "attention_mask", "position_ids", self._kept, *self._cache_names}
        known |= {PLACES, *WINDOWS} if PLACES in self._decoder.input_names else set()
        if set(self._decoder.input_names) != known or self._embed.input_names != ("input_ids",):
            raise BundleError(
                f"{self._decoder.name} takes {sorted(self._decoder.input_names)}",
                f"{sorted(known)} are needed, and input_ids for {self._embed.name}",
                "Export the bundle again.",
            )
        if (self._prefill.input_names, self._prefill.output_names) != (
            self._decoder.input_names,
            self._decoder.output_names,
        ):
            raise BundleError(
                f"{self._prefill.name} has other inputs or outputs than {self._decoder.name}",
                "the same are needed",
                "Export the bundle again.",
            )

    def run_prefixes(
        self,
        prefixes: Sequence[Sequence[int]],
        images: Sequence[Sequence[ImageTokens]],
        image_spans: Sequence[Sequence[tuple[int, int]]],
    ) -> Prefixes:
        """Run prefixes through the decoder once.

        Args:
            prefixes: Token ids of each; ids at image spans do not matter. May be empty.
            images: The images of each prefix.
            image_spans: Start and length in tokens of each image of each prefix.
        """
        ids, mask = _pad_left(prefixes)
        if ids.shape[1] == 0:
            return Prefixes(cache=self._empty_cache(len(prefixes)), mask=mask)
        embeddings = self._embed_tokens(ids)
        places: list[NDArray[np.int64]] = []
        for row, (prefix, own, spans) in enumerate(zip(prefixes, images, image_spans, strict=True)):
            padding = ids.shape[1] - len(prefix)
            for image, (start, length) in zip(own, spans, strict=True):
                first = padding + start
                embeddings[row, first : first + length] = image.tokens
                places.append(row * ids.shape[1] + first + image.looks)
        looks = self._gather_looks(places, [image for own in images for image in own])
        _, cache = self._read(embeddings, mask, self._empty_cache(len(prefixes)), looks=looks)
        return Prefixes(cache=cache, mask=mask)

    def continue_greedily(
        self,
        prefixes: Prefixes,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: Sequence[int],
    ) -> list[Continuation]:
        """Answer prompts that each go on from a prefix.

        Args:
            prefixes: From ``run_prefixes``.
            rows: Which prefix each prompt follows, ``[Q]``.
            prompts: Token ids of each prompt after its prefix; at least one each.
            max_new_tokens: Most tokens to write after each prompt; at least 1 each.
        """
        most = max(max_new_tokens)
        first_logits, mask, cache = self._run_prompts(prefixes, rows, prompts, new=most)
        written: list[list[int]] = [[] for _ in prompts]
        ended = np.zeros(len(prompts), bool)
        alive = np.arange(len(prompts))
        tokens = first_logits.argmax(axis=-1)
        while True:
            for question, token in zip(alive.tolist(), tokens.tolist(), strict=True):
                if ended[question]:
                    continue
                if token not in self._stop_ids:
                    written[question].append(token)
                ended[question] = token in self._stop_ids or len(written[question]) == max_new_tokens[question]
            kept = np.flatnonzero(~ended[alive])
            if len(kept) == 0:
                break
            # Moving the cache costs about as much as a step, so ended rows stay until they are half of it.
            if 2 * len(kept) <= len(alive):
                cache = self._take(cache, kept.tolist())
                alive, tokens, mask = alive[kept], tokens[kept], mask[kept]
            mask = np.concatenate([mask, np.ones((len(alive), 1), np.int64)], axis=1)
            cache = self._with_room(cache, mask.shape[1], most=mask.shape[1] + most)
            logits, cache = self._step(self._embed_tokens(tokens[:, None]), mask, cache)
            tokens = logits[:, -1].argmax(axis=-1)
        return [Continuation(tuple(tokens), first_logits[question]) for question, tokens in enumerate(written)]

    def choose(
        self,
        prefixes: Prefixes,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        options: Sequence[OptionIds],
        *,
        batch_size: int,
    ) -> list[Choice]:
        """Choose between the options of prompts that each go on from a prefix; see ``choosing``.

        Args:
            prefixes: From ``run_prefixes``.
            rows: Which prefix each prompt follows, ``[Q]``.
            prompts: Token ids of each prompt after its prefix; at least one each.
            options: Token ids of each prompt's options; at least one each.
            batch_size: Most options a run, where first tokens do not decide.
        """
        first_logits, mask, cache = self._run_prompts(prefixes, rows, prompts)
        leading = [
            leading_options([float(logits[ids[0]]) for ids in own], own)
            for logits, own in zip(first_logits, options, strict=True)
        ]
        tied = [(prompt, place) for prompt, places in enumerate(leading) if len(places) > 1 for place in places]
        sums: dict[tuple[int, int], float] = {}
        for start in range(0, len(tied), batch_size):
            part = tied[start : start + batch_size]
            # The first token's logits are there, and they are the same for all that share it.
            fed, fed_mask = _pad_left([options[prompt][place][:-1] for prompt, place in part])
            of_prompt = [prompt for prompt, _ in part]
            logits, _ = self._step(
                self._embed_tokens(fed),
                np.concatenate([mask[of_prompt], fed_mask], axis=1),
                self._take(cache, of_prompt, more=fed.shape[1]),
                keep=fed.shape[1],
                graph=self._prefill,
            )
            for row, (prompt, place) in enumerate(part):
                rest = options[prompt][place][1:]
                sums[prompt, place] = _log_probability(logits[row, fed.shape[1] - len(rest) :], rest)
        return [
            Choice(max(places, key=lambda place: sums.get((prompt, place), 0.0)), first_logits[prompt])
            for prompt, places in enumerate(leading)
        ]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self._stop_ids

    def start(
        self, prefixes: Prefixes, prompt: Sequence[int]
    ) -> tuple[NDArray[np.float32], Mapping[str, ort.OrtValue]]:
        """``[V]`` logits behind one prompt, and its cache without padding.

        Args:
            prefixes: From ``run_prefixes``, of this prompt alone.
            prompt: Token ids after the prefix; at least one.
        """
        logits, _, cache = self._run_prompts(prefixes, [0], [prompt])
        return logits[0], cache

    def go_on(
        self, tokens: Sequence[int], cache: Mapping[str, ort.OrtValue], lengths: Sequence[int], most: int
    ) -> tuple[NDArray[np.float32], Mapping[str, ort.OrtValue]]:
        """One step of several answers: ``[rows, V]`` logits, and the cache with the tokens in it.

        Args:
            tokens: The last token of each.
            cache: From ``arrange``, or from the step before; the tokens may be written into its memory.
            lengths: Tokens in the cache of each; the longest of them has no padding.
            most: Slots that a row will take in the end.
        """
        longest = max(lengths)
        mask = (np.arange(longest + 1) >= longest - np.array(lengths)[:, None]).astype(np.int64)
        cache = self._with_room(cache, longest + 1, most=most)
        logits, cache = self._step(self._embed_tokens(np.array(tokens, np.int64)[:, None]), mask, cache)
        return logits[:, -1], cache

    def arrange(
        self, rows: Sequence[tuple[Mapping[str, ort.OrtValue], int, slice]], *, most: int
    ) -> dict[str, ort.OrtValue]:
        """A cache of rows from several, padded on the left to the longest of them and no further.

        Args:
            rows: For each: a cache, the row in it, and the slots of its tokens there.
            most: Slots that a row will take in the end; some of them may be there already.
        """
        longest = max(slots.stop - slots.start for _, _, slots in rows)
        room = self._room(longest, most=most)
        arranged = {}
        for name in self._cache_names:
            sources = {id(cache): cache[name].numpy() for cache, _, _ in {id(row[0]): row for row in rows}.values()}
            first = next(iter(sources.values()))
            values = np.zeros((len(rows), first.shape[1], longest + room, first.shape[3]), first.dtype)
            for place, (cache, row, slots) in enumerate(rows):
                start = longest - (slots.stop - slots.start)
                values[place, :, start:longest] = sources[id(cache)][row, :, slots]
            arranged[name] = self._decoder.to_device(values)
        return arranged

    def _run_prompts(
        self, prefixes: Prefixes, rows: Sequence[int], prompts: Sequence[Sequence[int]], *, new: int = 0
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], Mapping[str, ort.OrtValue]]:
        """``[Q, V]`` logits behind each prompt, and mask and cache to go on from, which has room for new tokens."""
        ids, mask = _pad_left(prompts)
        mask = np.concatenate([prefixes.mask[list(rows)], mask], axis=1)
        room = self._room(mask.shape[1], most=mask.shape[1] + new)
        at_once = ids.shape[1] <= self._piece
        taken = self._take(prefixes.cache, rows, more=ids.shape[1] + room if at_once else 0)
        logits, cache = self._read(self._embed_tokens(ids), mask, taken, room=0 if at_once else room)
        return logits[:, -1], mask, cache

    def _read(
        self,
        embeddings: NDArray[np.float32],
        mask: NDArray[np.int64],
        cache: Mapping[str, ort.OrtValue],
        *,
        room: int = 0,
        looks: Mapping[str, NDArray[Any]] | None = None,
    ) -> tuple[NDArray[np.float32], Mapping[str, ort.OrtValue]]:
        """Run given tokens piece by piece: logits at the last one, and the longer cache, with more slots behind it."""
        length = embeddings.shape[1]
        before, pieces = mask.shape[1] - length, -(-length // self._piece)
        for begin, end in pairwise(length * piece // pieces for piece in range(pieces + 1)):
            if room and end == length:
                cache = self._widen(cache, end - begin + room)
            logits, cache = self._step(
                embeddings[:, begin:end],
                mask[:, : before + end],
                cache,
                looks=None if looks is None else _cut_looks(looks, length, begin, end),
                graph=self._prefill,
            )
        return logits, cache

    def _step(
        self,
        embeddings: NDArray[np.float32],
        mask: NDArray[np.int64],
        cache: Mapping[str, ort.OrtValue],
        *,
        keep: int = 1,
        looks: Mapping[str, NDArray[Any]] | None = None,
        graph: Graph | None = None,
    ) -> tuple[NDArray[np.float32], Mapping[str, ort.OrtValue]]:
        """Logits at the last positions, ``[rows, keep, V]``, and the longer cache.

        A cache that has room for the mask's last slots is written there; another one is left as it is.
        """
        length, room = embeddings.shape[1], self._slots(cache) - mask.shape[1]
        position_ids = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -length:]
        into = {}
        if room >= 0:
            mask = np.pad(mask, ((0, 0), (0, room)))
            into = {name.replace("past_key_values.", "present."): value for name, value in cache.items()}
        kept = np.arange(length - keep, length) if self._kept == _OLD_KEPT else np.array(keep, np.int64)
        inputs = {
            "inputs_embeds": embeddings,
            "attention_mask": mask,
            "position_ids": position_ids,
            self._kept: kept,
            **cache,
            **(self._no_looks if looks is None else looks),
        }
        outputs = (graph or self._decoder).run(inputs, on_host=_ON_HOST, into=into)
        logits: NDArray[np.float32] = outputs["logits"].numpy()
        if into:
            return logits, cache  # not the outputs: they do not keep the arrays alive whose memory they show
        return logits, {name: outputs[name.replace("past_key_values.", "present.")] for name in self._cache_names}

    def _slots(self, cache: Mapping[str, ort.OrtValue]) -> int:
        return int(cache[self._cache_names[0]].shape()[2])

    def _room(self, used: int, *, most: int) -> int:
        """Slots behind those in use."""
        return max(0, min(max(_ROOM, used // _ROOM_SHARE), most - used)) if self._takes_buffer else 0

    def _with_room(self, cache: Mapping[str, ort.OrtValue], slots: int, *, most: int) -> Mapping[str, ort.OrtValue]:
        """A cache that has so many slots, where the graph can use them."""
        room = self._room(slots, most=most)
        missing = slots - self._slots(cache)
        if missing <= 0 or not self._takes_buffer:
            return cache
        return self._widen(cache, missing + room)

    def _widen(self, cache: Mapping[str, ort.OrtValue], more: int) -> dict[str, ort.OrtValue]:
        behind = ((0, 0), (0, 0), (0, more), (0, 0))
        return {name: self._decoder.to_device(np.pad(value.numpy(), behind)) for name, value in cache.items()}

    def _gather_looks(
        self, places: Sequence[NDArray[np.int64]], images: Sequence[ImageTokens]
    ) -> Mapping[str, NDArray[Any]]:
        if not self._no_looks or not images:
            return self._no_looks
        windows = {name: np.concatenate([image.windows[name] for image in images]) for name in WINDOWS}
        return {PLACES: np.concatenate(places), **windows}

    def _embed_tokens(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        embeddings: NDArray[np.float32] = self._embed.run({"input_ids": ids}, on_host=("inputs_embeds",))[
            "inputs_embeds"
        ].numpy()
        return embeddings

    def _empty_cache(self, rows: int) -> dict[str, ort.OrtValue]:
        cache = {}
        for name in self._cache_names:
            heads, width = self._decoder.sizes(name, rank=4, fixed=(1, 3))
            cache[name] = self._decoder.to_device(np.zeros((rows, heads, 0, width), np.float32))
        return cache

    def _take(
        self, cache: Mapping[str, ort.OrtValue], rows: Sequence[int], *, more: int = 0
    ) -> dict[str, ort.OrtValue]:
        """Rows of a cache, with more slots where the graph can use them."""
        index = np.asarray(rows, np.int64)
        taken = {}
        for name, value in cache.items():
            values = value.numpy()
            _, heads, slots, width = values.shape
            wider = np.zeros((len(index), heads, slots + more * self._takes_buffer, width), values.dtype)
            wider[:, :, :slots] = values[index]
            taken[name] = self._decoder.to_device(wider)
        return taken


def _no_looks(decoder: Graph) -> dict[str, NDArray[Any]]:
    empty: dict[str, NDArray[Any]] = {PLACES: np.zeros(0, np.int64)}
    for name in WINDOWS:
        rank = 3 if name == "window_keys" else 2
        sizes = decoder.sizes(name, rank=rank, fixed=range(1, rank))
        empty[name] = np.zeros((0, *sizes), bool if name == "window_mask" else np.float32)
    return empty


def _cut_looks(looks: Mapping[str, NDArray[Any]], length: int, begin: int, end: int) -> Mapping[str, NDArray[Any]]:
    """What tokens from begin to end look at, of rows of a length."""
    if not looks:
        return looks
    rows, slots = np.divmod(looks[PLACES], length)
    inside = (begin <= slots) & (slots < end)
    places = rows[inside] * (end - begin) + slots[inside] - begin
    return {PLACES: places, **{name: looks[name][inside] for name in WINDOWS}}


def _pad_left(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    longest = max(len(row) for row in rows)
    ids = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        if row:
            ids[index, longest - len(row) :] = row
            mask[index, longest - len(row) :] = 1
    return ids, mask


def _log_probability(logits: NDArray[np.float32], token_ids: Sequence[int]) -> float:
    """Of tokens, each after its row of ``[len(token_ids), V]``; added up."""
    wide = logits.astype(np.float64)
    highest = wide.max(axis=-1)
    normaliser = highest + np.log(np.exp(wide - highest[:, None]).sum(axis=-1))
    return float((wide[np.arange(len(token_ids)), list(token_ids)] - normaliser).sum())
