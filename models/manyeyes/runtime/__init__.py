"""Runs an ONNX bundle: numpy, ONNX Runtime, tokenizers and Pillow, no torch.

``preprocess`` turns image bytes into pixels and ``chat`` turns conversations into tokens; training, evaluation and
the bundle all use these two, so that what a model saw is what it will see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyeyes.runtime.bundle import Bundle, GeneratedAnswer, Group, load_bundle
    from manyeyes.runtime.engine import AnswerPiece, Chat, ChatAnswer, Engine
    from manyeyes.runtime.sampling import Sampling
    from manyeyes.runtime.vision import ImageCache, ImageLike, ImageTokens

_HOMES = {
    "AnswerPiece": "engine",
    "Bundle": "bundle",
    "Chat": "engine",
    "ChatAnswer": "engine",
    "Engine": "engine",
    "GeneratedAnswer": "bundle",
    "Group": "bundle",
    "ImageCache": "vision",
    "ImageLike": "vision",
    "ImageTokens": "vision",
    "Sampling": "sampling",
    "load_bundle": "bundle",
}

__all__ = [
    "AnswerPiece",
    "Bundle",
    "Chat",
    "ChatAnswer",
    "Engine",
    "GeneratedAnswer",
    "Group",
    "ImageCache",
    "ImageLike",
    "ImageTokens",
    "Sampling",
    "load_bundle",
]


def __getattr__(name: str) -> Any:
    # Recipes use modules of this package too, and should not wait for ONNX Runtime.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
