"""Answers questions about images from an ONNX bundle.

::

    bundle = load_bundle("bundle/")
    bundle.answer("What colour is the circle?", images=[Path("circle.png").read_bytes()])

An image runs through the encoders once, however many questions there are about it, and so do the tokens up to and
including it: all questions of a ``Group`` go on from one key-value cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from manyeyes.errors import BundleError, RecipeError, RecordError
from manyeyes.runtime.bundle_contents import (
    CHAT,
    PREPROCESS,
    TOKENIZER,
    ChatFile,
    GraphName,
    PreprocessFile,
    check_files,
    choose_variant,
    needed_files,
    read_file,
    read_manifest,
)
from manyeyes.runtime.chat import IMAGE_PLACEHOLDER, ChatTemplate, Encoded, Turns, encode_conversation, stop_token_ids
from manyeyes.runtime.decoding import Decoder, OptionEncoder, OptionIds, check_choices
from manyeyes.runtime.preprocess import ImageTransform
from manyeyes.runtime.sessions import CPU, Graph, choose_prefill, choose_providers, choose_threads
from manyeyes.runtime.tiling import TokenLayout
from manyeyes.runtime.tokenizer import library_errors, read_tokenizer
from manyeyes.runtime.vision import ImageCache, ImageLike, ImageTokens, Vision, read_images


@dataclass(frozen=True)
class Group:
    """Questions about the same images.

    Attributes:
        images: Image files, in the order in which the model sees them; none for a question about text. Whatever
            else ``answer`` takes for an image becomes the bytes of an image file.
        questions: Without ``<image>``: one placeholder and a newline per image are put in front.
        choices: What each question's answer is chosen from, after one prefill (``choosing``); an empty entry, or no
            entries at all, for an answer that is written freely.

    Raises:
        RecordError: Another number of entries than questions, or options that are empty or equal; something that is no
            image, or a question that is no text.
    """

    images: tuple[bytes, ...]
    questions: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        """Check images, questions and choices."""
        object.__setattr__(self, "images", read_images(self.images))
        if not isinstance(self.questions, list | tuple) or not all(isinstance(text, str) for text in self.questions):
            raise RecordError(f"questions is {self.questions!r:.60}", "a list of texts", "Write questions=(...).")
        check_choices(self.questions, self.choices)

    def options(self, question: int) -> tuple[str, ...]:
        """What a question's answer is chosen from; empty where it is written freely."""
        return self.choices[question] if self.choices else ()


@dataclass(frozen=True)
class GeneratedAnswer:
    """One answer.

    Attributes:
        text: Without special tokens and surrounding white space; or the option that was chosen.
        token_ids: What the model wrote, without the stop token; empty for a choice, which is not written.
        first_logits: ``[V]``, float32, at the first token, when asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    first_logits: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class _Prompt:
    group: int
    question: int
    encoded: Encoded

    @property
    def branch_ids(self) -> list[int]:
        """Token ids behind the images."""
        return self.encoded.input_ids[self.encoded.prefix_length :]


class Bundle:
    """A loaded bundle; make one with ``load_bundle``.

    Attributes:
        path: The bundle's folder.
        manifest: What ``manifest.json`` says.
        variant: Name of the variant that is loaded.
        providers: Execution providers that run the graphs, best first.
        decoder: The graphs that write.
        max_length: Most tokens, question, images and answer together.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        *,
        providers: Sequence[str],
        threads: int,
        image_cache: ImageCache | None = None,
        variant: str | None = None,
        prefill: bool = True,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.variant, chosen = choose_variant(path, manifest, variant)
        vision, embed, decoder = (path / chosen.graphs[name][0] for name in get_args(GraphName))
        chat, preprocess = read_file(ChatFile, path / CHAT), read_file(PreprocessFile, path / PREPROCESS)
        self._tokenizer = read_tokenizer(path / TOKENIZER, error=BundleError)
        self._template = ChatTemplate.from_dict(chat.template.model_dump())
        self._system: str | None = chat.system
        self._image_token_id = chat.image_token_id
        self.max_length = chat.max_length
        stop_ids = self._find_stops()
        self._vision = Vision(
            Graph(vision, providers=providers, threads=threads),
            {name: ImageTransform.from_dict(pixels.model_dump()) for name, pixels in preprocess.encoders.items()},
            layout=None if preprocess.layout is None else TokenLayout.from_dict(preprocess.layout.model_dump()),
            tile_tokens=chat.image_tokens,
            cache=image_cache,
        )
        files = [embed, decoder]
        if prefill and chosen.prefill and providers[0] == CPU:
            files.append(path / chosen.prefill)
        graphs = [Graph(file, providers=providers, threads=threads) for file in files]
        self.decoder = Decoder(*graphs, stop_ids=stop_ids)
        self._options = OptionEncoder(self._tokenizer, self._template, system=self._system, max_length=self.max_length)
        self.providers: tuple[str, ...] = self._vision.providers

    def _find_stops(self) -> list[int]:
        """Tokens that end an answer; a question is tokenised too, so that files that do not go together show here."""
        try:
            encode_conversation(
                self._tokenizer,
                self._template,
                [("human", f"{IMAGE_PLACEHOLDER}\na")],
                image_tokens=[1],
                image_token_id=self._image_token_id,
                system=self._system,
                generation_prompt=True,
            )
            return stop_token_ids(self._tokenizer, self._template)
        except (RecipeError, RecordError) as error:
            raise BundleError(
                f"{CHAT} and {TOKENIZER} do not go together: {error.found}", error.needed, "Export the bundle again."
            ) from error

    def answer(self, question: str, *, images: ImageLike | Sequence[ImageLike] = (), max_new_tokens: int = 32) -> str:
        """Answer one question.

        Args:
            question: Without ``<image>``.
            images: What the question is about, each the bytes of an image file, the path of one, an image of Pillow or
                an array of pixels, ``[H, W, 3]``, uint8, RGB.
            max_new_tokens: Most tokens to write.

        Raises:
            RecordError: As ``answer_groups``, or something that is no image or no text.
        """
        group = Group(images=read_images(images), questions=(question,))
        return self.answer_groups([group], max_new_tokens=max_new_tokens)[0][0].text

    def answer_groups(
        self,
        groups: Sequence[Group],
        *,
        max_new_tokens: int = 32,
        batch_size: int = 32,
        first_logits: bool = False,
    ) -> list[list[GeneratedAnswer]]:
        """Answer questions, greedily; an image runs once, and so does the prefix that its questions share.

        Args:
            groups: Images, and the questions about them.
            max_new_tokens: Most tokens to write an answer. Fewer are written where the model's length ends.
            batch_size: Most images, and most questions, a run of a graph.
            first_logits: Whether to keep the logits of each answer's first token.

        Returns:
            One list a group, one answer a question, in order.

        Raises:
            RecordError: An image cannot be decoded, a question holds ``<image>`` or is longer than the model allows,
                or ``max_new_tokens`` or ``batch_size`` is below 1.
        """
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise RecordError(f"{name} is {value!r:.60}", "a whole number of at least 1", f"Correct {name}.")
        answers: list[list[GeneratedAnswer]] = []
        for start in range(0, len(groups), batch_size):
            window = groups[start : start + batch_size]
            answers.extend(self._answer_window(window, max_new_tokens, batch_size, first_logits))
        return answers

    def encode_images(self, images: Sequence[ImageLike], *, batch_size: int = 32) -> list[ImageTokens]:
        """Run images through encoders, fusion and projector.

        Args:
            images: Image files.
            batch_size: Most images a run.

        Returns:
            Visual tokens of each, and what they look at where the language model looks back.

        Raises:
            RecordError: An image cannot be decoded, or unpadding leaves nothing of it.
        """
        encoded: list[ImageTokens] = []
        files = read_images(images)
        for start in range(0, len(files), batch_size):
            encoded.extend(self._vision.encode(files[start : start + batch_size]))
        return encoded

    def encode_chat(self, turns: Turns, images: Sequence[ImageTokens], *, system: str | None = None) -> Encoded:
        """Tokens of a conversation that ends with a question.

        Args:
            turns: Speaker (``human`` or ``gpt``) and text of each turn, ``<image>`` where an image goes.
            images: From ``encode_images``, in order.
            system: Replaces the bundle's system text.

        Raises:
            RecordError: Turns do not alternate, another number of images, or more tokens than the model allows.
            RecipeError: A system text that the model's template has no place for.
        """
        encoded = encode_conversation(
            self._tokenizer,
            self._template,
            turns,
            image_tokens=[len(image.tokens) for image in images],
            image_token_id=self._image_token_id,
            system=self._system if system is None else system,
            generation_prompt=True,
        )
        question = turns[-1][1].replace(f"{IMAGE_PLACEHOLDER}\n", "")
        if len(encoded.input_ids) >= self.max_length:
            raise RecordError(
                f"question {question[:60]!r} with its images is {len(encoded.input_ids)} tokens long",
                f"fewer than {self.max_length} are needed",
                "Shorten it, or show fewer images.",
            )
        if len(encoded.input_ids) == encoded.prefix_length:
            raise RecordError("question is empty", "at least one token after the images is needed", "Write one.")
        return encoded

    def decode_text(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out.

        Raises:
            BundleError: The tokenizer cannot write them.
        """
        with library_errors(BundleError, found=f"{TOKENIZER} cannot write what the model answers"):
            return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _answer_window(
        self, groups: Sequence[Group], max_new_tokens: int, batch_size: int, first_logits: bool
    ) -> list[list[GeneratedAnswer]]:
        unique = list(dict.fromkeys(data for group in groups if group.questions for data in group.images))
        # How many tokens an image has may depend on its size, so images come before prompts.
        tokens = dict(zip(unique, self.encode_images(unique, batch_size=batch_size), strict=True))
        images = [[tokens[data] for data in group.images] if group.questions else [] for group in groups]
        prompts = list(self._encode_prompts(groups, images))
        if not prompts:
            return [[] for _ in groups]
        # Any question of a group has the group's prefix; a group without questions needs none.
        of_group = {prompt.group: prompt.encoded for prompt in prompts}
        rows = {group: row for row, group in enumerate(of_group)}
        prefixes = self.decoder.run_prefixes(
            [encoded.input_ids[: encoded.prefix_length] for encoded in of_group.values()],
            [images[group] for group in of_group],
            [encoded.image_spans for encoded in of_group.values()],
        )
        found: dict[tuple[int, int], GeneratedAnswer] = {}
        # Prompts of like length run together, so that little is padding.
        prompts.sort(key=lambda prompt: len(prompt.encoded.input_ids) - prompt.encoded.prefix_length)
        choosing = [prompt for prompt in prompts if groups[prompt.group].options(prompt.question)]
        writing = [prompt for prompt in prompts if not groups[prompt.group].options(prompt.question)]
        for start in range(0, len(writing), batch_size):
            batch = writing[start : start + batch_size]
            continuations = self.decoder.continue_greedily(
                prefixes,
                [rows[prompt.group] for prompt in batch],
                [prompt.branch_ids for prompt in batch],
                max_new_tokens=[min(max_new_tokens, self.max_length - len(p.encoded.input_ids)) for p in batch],
            )
            for prompt, written in zip(batch, continuations, strict=True):
                text = self.decode_text(written.token_ids).strip()
                kept = written.first_logits if first_logits else None
                found[prompt.group, prompt.question] = GeneratedAnswer(text, written.token_ids, kept)
        for start in range(0, len(choosing), batch_size):
            batch = choosing[start : start + batch_size]
            choices = self.decoder.choose(
                prefixes,
                [rows[prompt.group] for prompt in batch],
                [prompt.branch_ids for prompt in batch],
                [self._encode_options(groups[prompt.group], prompt) for prompt in batch],
                batch_size=batch_size,
            )
            for prompt, choice in zip(batch, choices, strict=True):
                text = groups[prompt.group].options(prompt.question)[choice.option]
                kept = choice.first_logits if first_logits else None
                found[prompt.group, prompt.question] = GeneratedAnswer(text, (), kept)
        return [
            [found[index, question] for question in range(len(group.questions))] for index, group in enumerate(groups)
        ]

    def _encode_prompts(self, groups: Sequence[Group], images: Sequence[Sequence[ImageTokens]]) -> Iterator[_Prompt]:
        for index, group in enumerate(groups):
            for place, question in enumerate(group.questions):
                if IMAGE_PLACEHOLDER in question:
                    raise RecordError(
                        f"question {question!r} holds {IMAGE_PLACEHOLDER}",
                        "the placeholder is put in front for every image",
                        "Leave it out.",
                    )
                turns = [("human", f"{IMAGE_PLACEHOLDER}\n" * len(group.images) + question)]
                encoded = self.encode_chat(turns, images[index])
                yield _Prompt(index, place, encoded)

    def _encode_options(self, group: Group, prompt: _Prompt) -> OptionIds:
        return self._options.encode(
            group.questions[prompt.question],
            group.options(prompt.question),
            num_images=len(group.images),
            prompt_length=len(prompt.encoded.input_ids),
        )


def load_bundle(
    path: str | Path,
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    verify: bool = True,
    image_cache: ImageCache | None = None,
    variant: str | None = None,
    prefill: bool | None = None,
) -> Bundle:
    """Load a bundle.

    Args:
        path: The bundle's folder.
        providers: Execution providers of ONNX Runtime, best first; by default CUDA where there is a device, else CPU.
        threads: Threads a graph may use; by default ``MANYEYES_THREADS``, else every core.
        verify: Whether to check the sha256 of every file that is needed.
        image_cache: Keeps the visual tokens of images; None without.
        variant: Name of one of the manifest's variants, for instance ``int4``; by default the one called ``default``,
            or the only one that was pulled.
        prefill: Whether a decoder in int4 is loaded a second time on a CPU, for the tokens that are given: that is
            quicker for many at once. By default yes, unless ``MANYEYES_PREFILL`` is 0.

    Raises:
        BundleError: A file is missing, has changed or makes no sense, the manifest is of another format, a provider is
            unknown or does not start, or a graph does not load or takes more memory than ``memory_limit``.
    """
    path = Path(path)
    chosen, num_threads = choose_providers(providers), choose_threads(threads)
    manifest = read_manifest(path)
    name, files = choose_variant(path, manifest, variant)
    check_files(path, needed_files(manifest, files), sha256=verify)
    return Bundle(
        path,
        manifest,
        providers=chosen,
        threads=num_threads,
        image_cache=image_cache,
        variant=name,
        prefill=choose_prefill(prefill),
    )
