"""VLMEvalKit's scores of single answers, without a judge; nothing of ManyEyes is imported.

Its packages import every model and every benchmark that it has; they are left empty here, and what is compared is
imported from the modules below them.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

Row = dict[str, Any]
Item = tuple[Row, str]

SOURCE = "VLMEVALKIT"
"""Environment variable with the folder of its source."""


def _empty_packages() -> None:
    root = Path(os.environ[SOURCE])
    for name in ("vlmeval", "vlmeval.dataset", "vlmeval.dataset.utils"):
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = package
    # Asked for by modules that we import; a judge is never built.
    vars(sys.modules["vlmeval.dataset.utils"]).update(DEBUG_MESSAGE="", build_judge=None)


_empty_packages()


def _lettered(texts: list[str]) -> Row:
    return {chr(65 + place): text for place, text in enumerate(texts)}


def _choice(benchmark: str, row: Row) -> tuple[Row, str]:
    """The options under their letters as VLMEvalKit's files have them, and the answer."""
    if benchmark in ("ai2d", "scienceqa"):
        texts = row["options"] if benchmark == "ai2d" else row["choices"]
        return _lettered(texts), chr(65 + int(row["answer"]))
    if benchmark == "seed":
        return _lettered([row[f"choice_{letter}"] for letter in "abcd"]), row["answer"]
    if benchmark == "cv-bench":
        return _lettered(row["choices"]), row["answer"].strip("()")
    if benchmark == "mmvp":
        texts = [text.strip() for text in re.split(r"\([ab]\)", row["Options"])[1:]]
        return _lettered(texts), row["Correct Answer"].strip("()").upper()
    if benchmark == "mmbench":
        return {letter: row[letter] for letter in "ABCD" if row[letter] != "nan"}, row["answer"]
    return _lettered(ast.literal_eval(row["options"])), row["answer"]


def _choices(benchmark: str, items: list[Item]) -> list[float]:
    import pandas

    rules = import_module("vlmeval.dataset.utils.multiple_choice")
    rows = []
    for number, (row, answer) in enumerate(items):
        letters, gold = _choice(benchmark, row)
        rows.append(
            {"index": number, "question": "?", "A": None, "B": None, **letters, "answer": gold, "prediction": answer}
        )
    data = pandas.DataFrame(rows)
    files: dict[str, Any] = {}

    def one_by_one(ask: Callable[..., Any], calls: list[Row], *, save: str, keys: list[Any], **_: Any) -> list[Any]:
        found = [ask(**call) for call in calls]
        files[save] = dict(zip(keys, found, strict=True))
        return found

    judge = rules.mcq_circular_eval if benchmark == "mmbench" else rules.mcq_vanilla_eval
    with (
        mock.patch.object(rules, "track_progress_rich", one_by_one),
        mock.patch.object(rules, "dump", lambda content, path: files.update({path: content})),
        mock.patch.object(rules, "load", lambda path: files[path]),
    ):
        name = "MMMU_DEV_VAL" if benchmark == "mmmu" else benchmark
        judged = judge(None, data.copy(), data.copy(), 1, "no such file", name)
    return [float(hit) for hit in judged.sort_values("index")["hit"]]


def _mathvista(row: Row, answer: str) -> float:
    check = import_module("vlmeval.dataset.utils.mathvista").post_check
    line = {**row, "choices": str(row["choices"]), "prediction": answer}
    if row["choices"]:
        line["answer_option"] = chr(65 + row["choices"].index(row["answer"]))
    read = check(line, prefetch=True)
    # ``is``: 0 is what was read, where False is nothing. Then a judge would be asked.
    return 0.0 if read is False else float(check({**line, "res": read}, prefetch=False))


def _yes_no(row: Row, answer: str) -> float:
    read = import_module("vlmeval.dataset.utils.yorn").YOrN_Extraction
    return float(read(answer) == row["answer"].capitalize())


def _words(benchmark: str) -> Callable[[Row, str], float]:
    rules = import_module("vlmeval.dataset.utils.vqa_eval")
    method = {
        "gqa": "accuracy",
        "chartqa": "relaxed_accuracy",
        "docvqa": "anls",
        "infovqa": "anls",
    }.get(benchmark, "vqa_score")
    dataset = {"gqa": "GQA", "chartqa": "ChartQA", "docvqa": "DocVQA", "infovqa": "InfoVQA", "textvqa": "TextVQA"}

    def score(row: Row, answer: str) -> float:
        golds = row["answers"] if "answers" in row else [row["answer"]]
        line = rules.process_line({"answer": str(golds), "prediction": answer}, method=method)
        return float(rules.hit_calculate([line], dataset.get(benchmark, "VizWiz"))[0])

    return score


def _ocrbench(row: Row, answer: str) -> float:
    import pandas

    module = import_module("vlmeval.dataset.image_vqa")
    line = {"category": row["question_type"], "answer": str(row["answer"]), "prediction": answer}
    with (
        mock.patch.object(module, "load", return_value=pandas.DataFrame([line])),
        mock.patch.object(module, "dump"),
        mock.patch.object(module, "tqdm", lambda items: items),
    ):
        return float(module.OCRBench.evaluate("answers.xlsx")["Final Score"])


def scores(benchmark: str, items: list[Item]) -> list[float]:
    """VLMEvalKit's score of each answer."""
    if benchmark in ("ai2d", "scienceqa", "seed", "cv-bench", "mmvp", "mmbench", "mmmu"):
        return _choices(benchmark, items)
    own = {"mathvista": _mathvista, "pope": _yes_no, "mme": _yes_no, "ocrbench": _ocrbench}
    score = own[benchmark] if benchmark in own else _words(benchmark)
    return [score(row, answer) for row, answer in items]
