"""What a version carries so that MLflow serves it where this package was never heard of."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

_MAX_NEW_TOKENS = 32

# As in pyproject.toml.
_ONNX_RUNTIME = (
    "onnxruntime-gpu>=1.23; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "onnxruntime>=1.23; sys_platform != 'linux' or platform_machine != 'x86_64'",
)

RUNTIME_PACKAGES = ("numpy", "pillow", "pydantic", "tokenizers")
"""What runs a bundle, beside ONNX Runtime under one of its names."""


def carried_requirements() -> list[str]:
    """What serving needs beside the code that a version carries: packages of the index, and none named ``manyeyes``.

    Nobody owns that name on a public index, so whoever took it would run code in every service that asked for it.
    """
    return [*(f"{name}=={metadata.version(name)}" for name in ("mlflow", *RUNTIME_PACKAGES)), *_ONNX_RUNTIME]


def copy_code(folder: Path) -> Path:
    """A copy of this package, for environments that do not have it."""
    own = Path(__file__).parents[1]
    return Path(shutil.copytree(own, folder / own.name, ignore=shutil.ignore_patterns("__pycache__")))


def carried_signature() -> ModelSignature:
    """What a version takes and gives: columns ``image`` and ``question``, a text a row."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(AnyType(), name="image", required=False), ColSpec(DataType.string, name="question")]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema([ParamSpec("max_new_tokens", DataType.integer, _MAX_NEW_TOKENS)]),
    )
