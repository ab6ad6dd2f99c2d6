"""Rows in each benchmark's own schema, written for the tests; their images are one red dot."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image


def dot() -> dict[str, Any]:
    """An image as the hub has it."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (255, 0, 0)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": "dot.png"}


def ai2d(**values: Any) -> dict[str, Any]:
    return {"question": "Which eats?", "options": ["a fox", "grass", "a hare"], "answer": "1", **values}


def scienceqa(**values: Any) -> dict[str, Any]:
    return {
        "question": "Which is solid?",
        "choices": ["juice", "rice"],
        "answer": 1,
        "hint": "Matter has states.",
        "subject": "natural science",
        "grade": "grade4",
        **values,
    }


def mme(**values: Any) -> dict[str, Any]:
    return {
        "question_id": "count/1.png",
        "question": "Are there two? Please answer yes or no.",
        "answer": "Yes",
        "category": "count",
        **values,
    }


def mmbench(index: int, **values: Any) -> dict[str, Any]:
    return {
        "index": index,
        "question": "What is it?",
        "hint": "nan",
        "answer": "A",
        "A": "dog",
        "B": "cat",
        "C": "nan",
        "D": "nan",
        "category": "identity",
        "L2-category": "coarse",
        "source": "test",
        **values,
    }


def seed(**values: Any) -> dict[str, Any]:
    return {
        "question_id": "101",
        "question": "What is it?",
        "choice_a": "dog",
        "choice_b": "cat",
        "choice_c": "owl",
        "choice_d": "fox",
        "answer": "B",
        "data_id": "d1",
        "data_type": "image",
        "question_type_id": 5,
        **values,
    }


def mathvista(**values: Any) -> dict[str, Any]:
    return {
        "pid": "1",
        "question": "How much?",
        "query": "Hint: ...\nQuestion: How much?",
        "choices": None,
        "precision": None,
        "answer": "14",
        "question_type": "free_form",
        "answer_type": "integer",
        "image": "images/1.jpg",
        "metadata": {"task": "math word problem", "skills": ["arithmetic reasoning", "algebraic reasoning"]},
        **values,
    }


def mmmu(**values: Any) -> dict[str, Any]:
    return {
        "id": "validation_Art_Theory_1",
        "question": "Who made <image 1>?",
        "options": "['Goya', 'Klee', 'O\\'Keeffe']",
        "answer": "B",
        "question_type": "multiple-choice",
        **values,
    }


def pope(**values: Any) -> dict[str, Any]:
    return {
        "question_id": "1",
        "question": "Is there a dog in the image?",
        "answer": "yes",
        "image_source": "COCO_val2014_1",
        "category": "random",
        **values,
    }


def mmvp(index: int, **values: Any) -> dict[str, Any]:
    return {
        "Index": index,
        "Question": "Is the dog facing left?",
        "Options": "(a) Yes (b) No",
        "Correct Answer": "(a)",
        **values,
    }


def realworldqa(**values: Any) -> dict[str, Any]:
    return {
        "question": "Which way?\n\nA. Left\nB. Right\nC. Ahead\nPlease answer directly with only the letter.",
        "answer": "C",
        **values,
    }


def cv_bench(**values: Any) -> dict[str, Any]:
    return {
        "idx": 0,
        "type": "2D",
        "task": "Count",
        "question": "How many?",
        "choices": ["1", "3", "2"],
        "answer": "(B)",
        "prompt": "How many? Select from the following choices.\n(A) 1\n(B) 3\n(C) 2",
        "source": "ADE20K",
        **values,
    }
