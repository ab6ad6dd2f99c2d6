"""Answers with pictures: ``<GEN>`` in, ``<h>prompt</h>`` out, and a text-to-image pipeline that draws the prompt.

A model is trained on plain text to write, for a request that ends with ``<GEN>``, what a text-to-image model should be
told. Drawing happens after the answer, outside of ``generate``, by any pipeline of ``diffusers`` (the extra
``drawing``); nothing of the request but the prompt reaches it.

Source: Mini-Gemini, arXiv:2403.18814, whose own wrapper draws one of the pairs with SDXL; here each pair is drawn.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from manyeyes.errors import DrawingError, did_you_mean
from manyeyes.storage import new_file, storage_errors

REQUEST = "<GEN>"
OPEN, CLOSE = "<h>", "</h>"

# What ``draw`` passes itself.
_RESERVED = ("prompt", "generator", "num_images_per_prompt", "output_type", "return_dict")


class DrawingWarning(UserWarning):
    """An answer whose tags cannot be drawn, or a picture that the pipeline withheld."""


@dataclass(frozen=True)
class Prompts:
    """What an answer asks for.

    Attributes:
        text: The answer without what is drawn.
        prompts: Between ``<h>`` and ``</h>``, in order.
        problems: One sentence for each tag that has no partner or holds nothing; such tags stay in ``text``.
    """

    text: str
    prompts: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class DrawnAnswer:
    """An answer and its pictures.

    Attributes:
        text: The answer without what was drawn.
        images: One for each prompt, in order.
        prompts: What was drawn.
        seeds: Of each image: ``draw`` of that prompt alone with this seed gives the image again.
        problems: Sentences about tags that could not be drawn and pictures that the pipeline withheld.
    """

    text: str
    images: tuple[Image.Image, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    problems: tuple[str, ...]


def request_drawing(question: str) -> str:
    """Ask for a picture: ``question`` with ``<GEN>`` at its end, as in the records that teach it."""
    question = question.rstrip()
    return question if question.endswith(REQUEST) else f"{question} {REQUEST}"


def find_prompts(answer: str) -> Prompts:
    """Split an answer into what is read and what is drawn.

    An ``<h>`` belongs to the nearest ``</h>`` after it with no other ``<h>`` between. Everything else is text.

    Args:
        answer: What the model wrote.
    """
    pieces: list[str] = []
    prompts: list[str] = []
    problems: list[str] = []
    start = 0  # of the text that is not yet in pieces
    opened: re.Match[str] | None = None
    for tag in re.finditer(f"{OPEN}|{CLOSE}", answer):
        if tag[0] == OPEN:
            if opened is not None:
                problems.append(_unclosed(opened))
            opened = tag
        elif opened is None:
            problems.append(f"{CLOSE} at character {tag.start()} of the answer has no {OPEN} before it")
        elif not (prompt := answer[opened.end() : tag.start()].strip()):
            problems.append(f"nothing stands between {OPEN} and {CLOSE} at character {opened.start()} of the answer")
            opened = None
        else:
            prompts.append(prompt)
            pieces.append(answer[start : opened.start()])
            start, opened = tag.end(), None
    if opened is not None:
        problems.append(_unclosed(opened) + "; was the answer cut off?")
    pieces.append(answer[start:])
    text = " ".join(stripped for piece in pieces if (stripped := piece.strip()))
    return Prompts(text=text, prompts=tuple(prompts), problems=tuple(problems))


def _unclosed(tag: re.Match[str]) -> str:
    return f"{OPEN} at character {tag.start()} of the answer has no {CLOSE}"


def draw(
    answer: str, pipeline: Callable[..., Any], *, seed: int = 0, settings: Mapping[str, object] | None = None
) -> DrawnAnswer:
    """Draw what an answer asks for.

    Args:
        answer: What the model wrote; without tags it comes back as text, and the pipeline does not run.
        pipeline: A text-to-image pipeline of diffusers, or anything that is called like one: ``prompt`` and
            ``generator`` in, an object with ``images`` (PIL) out.
        seed: Of the first image; each further one takes the next number.
        settings: Further arguments of the pipeline, such as ``num_inference_steps`` or ``negative_prompt``;
            the pipeline's own defaults otherwise.

    Returns:
        Text and images. Tags that do not pair are text, with a ``DrawingWarning``.

    Raises:
        DrawingError: The pipeline does not draw text, or does not know or refuses a setting.
    """
    import torch

    settings = dict(settings or {})
    _check_call(pipeline, settings)
    found = find_prompts(answer)
    problems = list(found.problems)
    images: list[Image.Image] = []
    for index, prompt in enumerate(found.prompts):
        # On the CPU, so that a seed means the same noise on every device.
        generator = torch.Generator("cpu").manual_seed(seed + index)
        try:
            result = pipeline(prompt=prompt, generator=generator, **settings)
        except (TypeError, ValueError) as error:
            raise DrawingError(
                f"pipeline {type(pipeline).__name__} with the settings {settings} refuses: {error}",
                "settings that it can draw with",
                "Correct or leave out --draw-set (settings in Python).",
            ) from error
        images.append(result.images[0])
        flags = getattr(result, "nsfw_content_detected", None)  # only a pipeline with a safety checker says so
        if flags and flags[0]:
            problems.append(f"the pipeline's safety checker withheld image {index} and gave a black one")
    for problem in problems:
        warnings.warn(f"{problem}.", DrawingWarning, stacklevel=2)
    return DrawnAnswer(
        text=found.text,
        images=tuple(images),
        prompts=found.prompts,
        seeds=tuple(range(seed, seed + len(images))),
        problems=tuple(problems),
    )


def load_pipeline(source: str, *, device: str = "") -> Callable[..., Any]:
    """Load a text-to-image pipeline; only safetensors are read, and no code that comes with it runs.

    Args:
        source: A folder that diffusers saved, or a hub id, ``owner/name`` or ``owner/name@revision``.
        device: For instance ``cuda``, where weights are float16; by default CUDA where there is one, else the CPU.

    Raises:
        DrawingError: diffusers is not installed, or there is no such pipeline, or it does not draw text.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise DrawingError(
            'package "diffusers" is not installed',
            'the extra "drawing" of manyeyes',
            "Install it: pip install 'manyeyes[drawing]'",
        )
    import torch
    from diffusers import DiffusionPipeline

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name, _, revision = source.partition("@")
    arguments: dict[str, Any] = {"use_safetensors": True}
    if Path(source).is_dir():
        name = source
        if not (Path(source) / "model_index.json").is_file():
            raise _no_pipeline(source, "the folder has no model_index.json")
    elif revision:
        arguments["revision"] = revision
    try:
        pipeline: Any = DiffusionPipeline.from_pretrained(name, **arguments)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise _no_pipeline(source, f"{type(error).__name__}: {error}") from error
    _check_call(pipeline, {})
    pipeline.set_progress_bar_config(disable=True)
    loaded: Callable[..., Any] = pipeline.to(where, torch.float16) if where.startswith("cuda") else pipeline.to(where)
    return loaded


def _no_pipeline(source: str, reason: str) -> DrawingError:
    return DrawingError(
        f'drawing pipeline "{source}" cannot be loaded: {reason}',
        "a folder that diffusers saved as safetensors, or a hub id: owner/name or owner/name@revision",
        "Check the path or the id, and the network for a hub id.",
    )


def _check_call(pipeline: Callable[..., Any], settings: Mapping[str, object]) -> None:
    name = type(pipeline).__name__
    parameters = [p for p in inspect.signature(pipeline).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    known = [parameter.name for parameter in named]
    needed = [parameter.name for parameter in named if parameter.default is parameter.empty]
    others = [argument for argument in needed if argument not in _RESERVED and argument not in settings]
    # A pipeline that names its arguments ignores further ones without a word (Stable Diffusion's **kwargs).
    takes_any = "prompt" not in known and len(known) < len(parameters)
    if others or ("prompt" not in known and not takes_any):
        raise DrawingError(
            f"pipeline {name} takes {', '.join(known) or 'nothing'}",
            "a text-to-image pipeline: a prompt and nothing else that must be given",
            "Use one that draws from text alone, such as StableDiffusionPipeline.",
        )
    for setting in settings:
        if setting in _RESERVED:
            raise DrawingError(f'setting is "{setting}"', "draw passes that itself", "Leave it out.")
        if setting not in known and not takes_any:
            raise DrawingError(
                f'setting is "{setting}"',
                f"one that pipeline {name} takes",
                did_you_mean(setting, known) + f"It takes {', '.join(known)}.",
            )


def save_images(drawn: DrawnAnswer, out: Path) -> list[Path]:
    """Write the images as PNG, each with its prompt and seed inside.

    Args:
        drawn: From ``draw``.
        out: Folder; made when missing. Names come from prompt and seed, so other pictures stay.

    Returns:
        The files, in the images' order.

    Raises:
        StorageError: No space or no permission.
    """
    paths = []
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for image, prompt, seed in zip(drawn.images, drawn.prompts, drawn.seeds, strict=True):
            facts = PngInfo()
            facts.add_itxt("prompt", prompt)
            facts.add_text("seed", str(seed))
            path = out / f"drawing-{sha256(f'{seed} {prompt}'.encode()).hexdigest()[:12]}.png"
            with new_file(path) as file:
                image.save(file, format="PNG", pnginfo=facts)
            paths.append(path)
    return paths
