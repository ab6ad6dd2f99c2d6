"""A pipeline of the same shape as train: an uncached step whose list is looped over, and a step after the loop."""

# kfp reads the annotations themselves: no `from __future__ import annotations` here.
from typing import List  # noqa: UP035  (kfp knows no other spelling for a list of artifacts)

from kfp import dsl

IMAGE = "manyeyes-toy:0.1.0"


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def words(
    text: str,
    words_out: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> list:
    from manyeyes.harness.base import run_step
    from tests.pipelines.toy_steps import WORDS

    outputs = {"words_out": words_out}
    result = run_step(WORDS, metrics=metrics, report=report, notes=notes, outputs=outputs, text=text)
    return result.values["words"]


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def letters(
    word: str,
    mode: str,
    total_out: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
):
    from manyeyes.harness.base import run_step
    from tests.pipelines.toy_steps import LETTERS

    outputs = {"total_out": total_out}
    run_step(LETTERS, metrics=metrics, report=report, notes=notes, outputs=outputs, label=word, word=word, mode=mode)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def add(totals: dsl.Input[List[dsl.Dataset]]) -> int:  # noqa: UP006
    return sum(int(open(total.path, encoding="utf-8").read()) for total in totals)  # noqa: PTH123


@dsl.pipeline(name="toy")
def toy(text: str, mode: str = "well"):
    first = words(text=text).set_caching_options(False)
    with dsl.ParallelFor(first.outputs["Output"]) as word:
        counted = letters(word=word, mode=mode)
    add(totals=dsl.Collected(counted.outputs["total_out"]))
