"""What the four systems' papers put around a question."""

from __future__ import annotations

from manyeyes.evaluation.benchmarks.benchmark import Row

PHRASE = "\nAnswer the question using a single word or phrase."
"""LLaVA-1.5, arXiv:2310.03744, section 3.3; Eagle (lmms-eval), Cambrian-1 and Mini-Gemini took it over."""

SHORT_ANSWER = "\nGive the short answer directly."
"""Cambrian-1's for OCRBench, DocVQA and InfographicVQA."""


def ask_for_phrase(row: Row, style: str) -> str:  # noqa: ARG001
    """The question as it is, and ``PHRASE``, in every style."""
    return str(row["question"]) + PHRASE


def ask_document(row: Row, style: str) -> str:
    """The question, with Cambrian's suffix in its style and ``PHRASE`` in the others."""
    return str(row["question"]) + (SHORT_ANSWER if style == "cambrian" else PHRASE)
