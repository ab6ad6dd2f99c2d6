"""MM-Vet: 218 open questions that need several abilities at once; a judge gives each answer 0.0 to 1.0.

Source: Yu et al., arXiv:2308.02490. The judge completes a table whose rows are question, ground truth, prediction and
correctness, after examples of right, wrong and half-right answers. The table and its scale are the authors', the
sentences and the examples are ours; their judge was gpt-4-0613. Figures compare only under one judge.

lmms-eval asks the model to reason step by step first, which changes the answers; here the model reads the question
alone, as LLaVA did. It also scores 0 where no verdict can be read; here that is no verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from manyeyes.evaluation.benchmarks.benchmark import (
    ID,
    IMAGE,
    TEXT,
    BenchmarkRow,
    Graded,
    Judging,
    Row,
    by_item,
    mean_percent,
    needs_judge,
)

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
"""Recognition, reading, knowledge, language generation, spatial awareness, mathematics."""

_TASK = (
    "Grade the prediction of an AI model against the ground truth. Where the ground truth joins elements with <AND>, "
    "the prediction is totally right only with all of them; where it joins them with <OR>, any one makes it totally "
    "right. The correctness is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 or 1.0 (totally "
    "right). Complete the last row's last cell: write the number and nothing else."
)
_EXAMPLES = (
    ("Which years does the sign name?", "1912 <AND> 1987", "1920", "0.0"),
    ("Which years does the sign name?", "1912 <AND> 1987", "It says 1912.", "0.5"),
    ("Which years does the sign name?", "1912 <AND> 1987", "1987 or 1978", "0.5"),
    ("Which years does the sign name?", "1912 <AND> 1987", "1912 and 1987", "1.0"),
    ("What is the woman holding?", "umbrella <OR> parasol", "She holds a parasol.", "1.0"),
    (
        "Why is this drawing funny?",
        "The dog sits at the desk and types while its owner lies in the basket on the floor. They have changed places, "
        "as if the dog had to earn the money.",
        "It is funny because a dog is at a computer.",
        "0.4",
    ),
    (
        "Why is this drawing funny?",
        "The dog sits at the desk and types while its owner lies in the basket on the floor. They have changed places, "
        "as if the dog had to earn the money.",
        "Dog and owner have swapped roles: the dog works at the desk as if it had to earn a living, and the man rests "
        "in the dog's basket.",
        "1.0",
    ),
)


def ask(row: Row, prediction: str, variant: str) -> Sequence[Mapping[str, str]]:  # noqa: ARG001
    """The table whose last cell the judge completes."""
    truth = str(row["answer"]).replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    lines = [_TASK, "", "Question | Ground truth | Prediction | Correctness", "--- | --- | --- | ---"]
    lines += [" | ".join(example) for example in _EXAMPLES]
    lines.append(f"{row['question']} | {truth} | {prediction} |")
    return [{"role": "user", "content": "\n".join(lines)}]


def read_correctness(verdict: str) -> float | None:
    """The first word of a verdict as a number from 0 to 1, or ``None``."""
    try:
        correctness = float(verdict.strip().split(" ")[0])
    except ValueError:
        return None
    return correctness if 0 <= correctness <= 1 else None


def read(row: Row, prediction: str, verdict: str, variant: str) -> Graded | None:  # noqa: ARG001
    """The judge's number as the score."""
    correctness = read_correctness(verdict)
    if correctness is None:
        return None
    named = {name.strip() for name in str(row["capability"]).split(",")}
    return Graded(
        id=row["id"],
        cluster=row["id"],
        parsed=prediction,
        score=correctness,
        facets={"capabilities": " ".join([name for name in CAPABILITIES if name in named])},
    )


def by_capability(graded: Sequence[Graded], variant: str) -> dict[str, float]:
    """Mean over all items; over those that need a capability (``ocr``); over those that need just these (``rec+ocr``).

    A question that needs one capability alone is in ``ocr`` as in ``ocr only``.
    """
    scores = mean_percent(graded, variant)
    for capability in CAPABILITIES:
        part = [item for item in graded if capability in item.facets["capabilities"].split()]
        if part:
            scores[capability] = mean_percent(part, variant)["score"]
    combinations: dict[str, list[Graded]] = {}
    for item in graded:
        combinations.setdefault(item.facets["capabilities"], []).append(item)
    for names, part in sorted(combinations.items()):
        name = names.replace(" ", "+") if " " in names else f"{names} only"
        scores[name] = mean_percent(part, variant)["score"]
    return scores


MM_VET = BenchmarkRow(
    name="mm-vet",
    title="MM-Vet",
    hub_id="lmms-lab/MMVet",
    split="test",
    columns={
        "question_id": ID,
        "image": IMAGE,
        "question": TEXT,
        "answer": TEXT,
        "image_source": TEXT,
        "capability": TEXT,
    },
    licence="non-commercial research and education (LICENSE_DATASET of yuweihao/MM-Vet)",
    reported_by=("llava", "mini-gemini"),
    variants=("official",),
    default_variant="official",
    default_reason="the others read a verdict the same way, and count those that cannot be read as 0",
    item_id=lambda row: str(row["question_id"]),
    cluster=by_item,
    prompt=lambda row, style: str(row["question"]),  # noqa: ARG005
    max_new_tokens=1024,
    grade=needs_judge,
    aggregate=by_capability,
    mean_scale=100,
    judged=True,
    scorer="mm-vet correctness 1",
    metric="the judge's correctness, percent",
    group=lambda row: str(row["capability"]),
)

JUDGING = Judging(ask=ask, read=read, temperature=0.0, max_tokens=128, prompts="mm-vet 1", example="0.5")
