"""The MLflow model around a bundle: MLflow copies this file next to the bundle and runs it from there.

It needs ``manyeyes.runtime`` alone: no torch where the model is served.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from manyeyes.errors import RecordError
from manyeyes.runtime.bundle import Bundle, Group, load_bundle
from manyeyes.runtime.vision import read_image


class BundleModel(PythonModel):
    """Answers questions about images.

    Input: a pandas DataFrame, or a list of dicts, with the columns ``question`` and ``image``. An image is bytes, the
    path of a file, base64 text (with or without ``data:...;base64,``), an image of Pillow, an array ``[H, W, 3]`` of
    uint8, or nothing for a question about no image.
    Output: a list of answers. ``params={"max_new_tokens": 64}`` allows longer ones. Loaded with
    ``model_config={"variant": "int4"}``, it is another variant of the bundle that answers.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the bundle that was logged with the model."""
        variant = (context.model_config or {}).get("variant")
        self.bundle: Bundle = load_bundle(Path(context.artifacts["bundle"]), variant=variant)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Answer each row; rows with the same image share one pass of the encoders."""
        del context
        # MLflow makes a DataFrame of a list of dicts.
        rows = model_input.to_dict("records")
        return answer_rows(self.bundle, rows, max_new_tokens=int((params or {})["max_new_tokens"]))


def answer_rows(bundle: Bundle, rows: Sequence[Mapping[Any, Any]], *, max_new_tokens: int) -> list[str]:
    """Answers in the order of the rows.

    Raises:
        RecordError: A row without a question, or with an image that cannot be read.
    """
    by_image: dict[bytes | None, list[int]] = {}
    questions: list[str] = []
    for number, row in enumerate(rows):
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise RecordError(f"row {number} has the question {question!r}", "a text", "Fill in the column `question`.")
        questions.append(question)
        by_image.setdefault(_image_bytes(row.get("image"), row=number), []).append(number)
    groups = [
        Group(images=() if image is None else (image,), questions=tuple(questions[number] for number in numbers))
        for image, numbers in by_image.items()
    ]
    answers = bundle.answer_groups(groups, max_new_tokens=max_new_tokens) if groups else []
    texts = [""] * len(questions)
    for numbers, group in zip(by_image.values(), answers, strict=True):
        for number, answer in zip(numbers, group, strict=True):
            texts[number] = answer.text
    return texts


def _image_bytes(image: Any, *, row: int) -> bytes | None:
    # pandas writes NaN for nothing.
    if image is None or (isinstance(image, float) and math.isnan(image)) or (isinstance(image, str) and not image):
        return None
    try:
        return read_image(image, name=f"the image of row {row}")
    except RecordError:
        if not isinstance(image, str):
            raise
    try:
        return base64.b64decode(image.partition(";base64,")[2] or image, validate=True)
    except ValueError as error:
        raise RecordError(
            f"row {row} has the image {image[:60]!r}",
            "bytes, the path of a file that exists, or base64 text",
            "Correct the column `image`.",
        ) from error


mlflow.models.set_model(BundleModel())
