"""lmms-eval's scores of single answers; nothing of ManyEyes is imported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest import mock

Row = dict[str, Any]


def _named(task: str, function: str, key: str, field: str = "") -> Callable[[Row, str], float]:
    module = import_module(f"lmms_eval.tasks.{task}.utils")

    def score(row: Row, answer: str) -> float:
        result = getattr(module, function)(row, [answer])[key]
        return float(result[field] if field else result)

    return score


def _exact_match(row: Row, answer: str) -> float:
    metrics = import_module("lmms_eval.api.metrics")
    found = metrics.exact_match_hf_evaluate([answer], [row["target"]], ignore_case=True, ignore_punctuation=True)
    return float(found["exact_match"])


def _ai2d(row: Row, answer: str) -> float:
    utils = import_module("lmms_eval.tasks.ai2d.utils")
    read = utils.MultiChoiceRegexFilter.apply(None, [[answer]], [row])[0]
    return _exact_match({"target": utils.ai2d_doc_to_target(row, "mcq")}, read.strip())


def _anls(row: Row, answer: str) -> float:
    return float(import_module("lmms_eval.api.metrics").anls(row["answers"], [answer])["anls"])


def _seed(row: Row, answer: str) -> float:
    utils = import_module("lmms_eval.tasks.seedbench.utils")
    return float(utils.seed_aggregation_result([utils.seed_process_result(row, [answer])["seed_all"]]))


def _mme(row: Row, answer: str) -> float:
    utils = import_module("lmms_eval.tasks.mme.utils")
    return float(next(iter(utils.mme_process_results(row, [answer]).values()))["score"])


def _mmmu(row: Row, answer: str) -> float:
    utils = import_module("lmms_eval.tasks.mmmu.utils")
    # Its answer to what it cannot read is a random letter; ours is none unless asked for.
    with mock.patch("random.choice", return_value=""):
        sample = utils.mmmu_process_results(row, [answer])["mmmu_acc"]
    return float(utils.evaluate_mmmu([sample])[1]["acc"])


def _mmbench(row: Row, answer: str) -> float:
    import pandas

    evaluator = import_module("lmms_eval.tasks.mmbench.mmbench_evals").MMBench_Evaluator()
    asked = pandas.DataFrame([{**row, "prediction": answer}])
    return float(evaluator.eval_sub_data(asked, {row["index"]: row["answer"]}, static_only=True))


class _JudgeIsAsked(BaseException):
    """An ``Exception`` is caught over there."""


def _mathvista(row: Row, answer: str) -> float | None:
    rules = import_module("lmms_eval.tasks.mathvista.mathvista_evals").MathVistaEvaluator
    evaluator = rules(quick_extract=True)
    with mock.patch.object(rules, "get_chat_response", side_effect=_JudgeIsAsked):
        try:
            extraction = evaluator.extract_answer(answer, row, quick_extract=True)
        except _JudgeIsAsked:
            return None
    asked = [row[column] for column in ("choices", "question_type", "answer_type", "precision")]
    return float(evaluator.safe_equal(evaluator.normalize_extracted_answer(extraction, *asked), row["answer"]))


def score_of(benchmark: str) -> Callable[[Row, str], float | None]:
    """lmms-eval's rule for a benchmark."""
    own = {
        "mmbench": _mmbench,
        "mathvista": _mathvista,
        "ai2d": _ai2d,
        "gqa": lambda row, answer: _exact_match({"target": row["answer"]}, answer),
        "docvqa": _anls,
        "infovqa": _anls,
        "seed": _seed,
        "mme": _mme,
        "mmmu": _mmmu,
    }
    named = {
        "vqav2": ("vqav2", "vqav2_process_results", "exact_match"),
        "vizwiz": ("vizwiz_vqa", "vizwiz_vqa_process_results", "exact_match"),
        "textvqa": ("textvqa", "textvqa_process_results", "exact_match"),
        "ocrbench": ("ocrbench", "ocrbench_process_results", "ocrbench_accuracy", "score"),
        "chartqa": ("chartqa", "chartqa_process_results", "relaxed_overall"),
        "scienceqa": ("scienceqa", "sqa_process_results", "exact_match"),
        "pope": ("pope", "pope_process_results", "pope_accuracy", "score"),
        "mmvp": ("mmvp", "mmvp_process_results", "mmvp_accuracy", "is_correct"),
        "realworldqa": ("realworldqa", "realworldqa_process_results", "exact_match"),
        "cv-bench": ("cv_bench", "cv_bench_process_results", "cv_bench_acc", "is_correct"),
    }
    return own[benchmark] if benchmark in own else _named(*named[benchmark])


def scores(benchmark: str, items: list[tuple[Row, str]]) -> list[float | None]:
    """lmms-eval's score of each answer; ``None`` where it would ask a judge.

    Answers are stripped first, as its ``Task.process_results`` strips them.
    """
    score = score_of(benchmark)
    # Some of its rules change the row that they are given.
    return [score(copy.deepcopy(row), answer.strip()) for row, answer in items]
