"""What preflight looks at of the judge: hours of training should not end before a key that was mistyped."""

from __future__ import annotations

import os

from manyeyes.recipe import Recipe
from manyeyes.recipe.judge import JudgeSpec
from manyeyes.steps.preflight_checks import Check, trains_here

_TIMEOUT_S = 10.0


def check_judge(recipe: Recipe) -> list[Check]:
    """That the judge answers, where a benchmark of the recipe needs one: one question, one token of answer.

    Without a judge such benchmarks are skipped: a warning. A judge that is away or busy may be back by the time that it
    is asked: a warning too. Both are wrong where a gate rule is on such a benchmark. A judge that refuses the key or
    lacks the model ends the evaluation, whatever the gate says; an empty key is a warning on a machine that does not
    evaluate.

    Returns:
        No rows where no benchmark needs a judge.

    Raises:
        JudgeError: The gate needs the judge, which is away or busy.
    """
    from manyeyes.evaluation.benchmarks import BENCHMARKS
    from manyeyes.evaluation.judging.judge import Judge, JudgeError
    from manyeyes.evaluation.judging.scoring import JUDGINGS

    spec = recipe.evaluation.judge
    asked = [name for name in recipe.evaluation.benchmarks if name in BENCHMARKS]
    needed = [name for name in asked if BENCHMARKS[name].judged or (spec is not None and name in JUDGINGS)]
    if not needed:
        return []
    gated = [name for name in needed if name in {getattr(rule, "benchmark", None) for rule in recipe.gate}]
    if spec is None:
        return [_without(needed, gated)]
    try:
        served = Judge(spec.model_copy(update={"timeout_s": min(spec.timeout_s, _TIMEOUT_S)})).probe()
    except JudgeError as error:
        if error.retry and gated:
            raise
        has_key = bool(os.environ.get(spec.key_from, "").strip())
        certain = not error.retry and (bool(gated) or has_key or trains_here())
        do = error.do if error.retry else f"{error.do} It is asked about {', '.join(needed)}."
        return [Check("judge", "problem" if certain else "warning", error.found, error.needed, do)]
    return [Check("judge", "ok", f"{spec.model} at {spec.endpoint} answers{_as(served, spec)}; {', '.join(needed)}")]


def _without(needed: list[str], gated: list[str]) -> Check:
    do = "Give evaluation.judge in the recipe, with an endpoint and a model."
    if gated:
        found = f"no judge, and the gate has rules on {', '.join(gated)}"
        return Check("judge", "problem", found, "a language model that judges", do)
    return Check(
        "judge", "warning", f"no judge: {', '.join(needed)} will be skipped", "a language model that judges", do
    )


def _as(served: str, spec: JudgeSpec) -> str:
    return f" as {served}" if served and served != spec.model else ""
