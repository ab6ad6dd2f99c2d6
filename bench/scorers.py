"""Our scorers beside lmms-eval's own functions, answer by answer: ``python -m bench.scorers``.

Rows are written here in the hub's columns, and the answers are what models write and parsers stumble over: letters in
brackets, whole sentences, several letters, numbers with units, other cases, nothing at all. Ours score with
``variant=lmms``. Exit 1 where a score differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.peers_install import SCORER_PACKAGES, make_peer_python
from manyeyes.evaluation.benchmarks import find_benchmark

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("scorers_worker.py")
SHOWN = 5

LETTERS = (
    "{letter}", "{lower}", "({letter})", "{letter}.", "{letter})", " {letter} \n", "{letter}: {text}",
    "{letter}. {text}", "({lower}) {text}",
    "The answer is {letter}.", "The answer is ({letter}).", "Answer: {letter}", "Option {letter}",
    "I think it is {letter}, not {other}.", "{letter} and {other}", "{other} or {letter}", "**{letter}**",
    "Between {other} and {letter} the best answer is {letter}.", "{text}", "{text}.", "It shows {text} in the middle.",
    "{letter}{other}", "\\boxed{{{letter}}}", "{letter},", "'{letter}'", "answer is {lower}", "{letter}\n{text}",
    "A good question. {letter}", "I cannot tell.", "Because of this.", "", " ", ".", "E", "Z", "(Z)", "1", "{number}",
)  # fmt: skip
WORDS = (
    "{answer}", "{upper}", "{answer}.", " {answer}\n", "The answer is {answer}.", "the {answer}", "a {answer}",
    "{answer}, {answer}", '"{answer}"', "'{answer}'", "{answer}!", "{answer}?", "({answer})", "{answer} and more",
    "{first}", "{answer}s", "{answer} %", "{answer}%", "${answer}", "{answer},", "{answer}-", "{answer}/{answer}",
    "{answer}\t", "an  {answer}", "{answer};", "{answer} ({answer})", "Unanswerable", "none", "zero", "two", "2",
    "10,000", "1.5", "0.05", "5%", "1e3", "nan", "inf", "dont", "don't", "", " ", ".", "\uff21\uff22", "café", "…",
    "x" * 60,
)  # fmt: skip
YES_NO = (
    "Yes", "No", "yes", "no", "YES.", "No.", " yes \n", "yes, there is", "No, there is not", "There is no dog.", "Y",
    "n", "x", "not", "Yesterday", "nothing", "I do not know", "It is yes", "maybe", "true", "", " ", ".", "no yes",
    "yes no", "Yes!", "'yes'", "nope", "y.", "unknown",
)  # fmt: skip


def choice_answers(options: list[str], right: int) -> list[str]:
    """Answers around each of the options."""
    answers = []
    for place, text in enumerate(options):
        letter, other = chr(65 + place), chr(65 + right if place != right else 65 + (place + 1) % len(options))
        values = {"letter": letter, "lower": letter.lower(), "other": other, "text": text, "number": place}
        answers += [template.format(**values) for template in LETTERS]
    return list(dict.fromkeys(answers))


def free_answers(words: list[str]) -> list[str]:
    """Answers around each of some words."""
    made = [
        template.format(answer=word, upper=word.upper(), first=word[: max(1, len(word) // 2)])
        for word in words
        for template in WORDS
    ]
    return list(dict.fromkeys(made))


def cases() -> dict[str, list[tuple[dict[str, Any], str]]]:
    """By benchmark its rows, each with every answer."""
    people = ["red", "red", "Red.", "dark red", "the red", "2", "two", "red", "don't know", "1,000"]
    same = ["Pepsi Cola"] * 6 + ["pepsi", "pepsi cola", "unanswerable", "cola"]
    free = free_answers(["red", "Pepsi Cola", "2", "1,000", "50%", "it's", "x²+1", "Main St."])
    texts = ["a cat", "the dog", "No animal", "both"]
    choice = choice_answers(texts, 1)
    ids = {"question_id": "7", "image_id": "3"}
    rows: dict[str, list[tuple[dict[str, Any], list[str]]]] = {
        "vqav2": [
            (
                {
                    **ids,
                    "question": "What?",
                    "question_type": "what",
                    "answer_type": "other",
                    "multiple_choice_answer": "red",
                    "answers": [
                        {"answer": word, "answer_confidence": "yes", "answer_id": number}
                        for number, word in enumerate(words)
                    ],
                },
                free,
            )
            for words in (people, same)
        ],
        "vizwiz": [
            ({**ids, "question": "What?", "answers": words, "category": "other"}, free) for words in (people, same)
        ],
        "textvqa": [
            ({**ids, "question": "What?", "answers": words, "ocr_tokens": []}, free) for words in (people, same)
        ],
        "gqa": [({"id": "1", "imageId": "2", "question": "What?", "answer": answer}, free) for answer in ("red", "2")],
        "ocrbench": [
            ({"dataset": dataset, "question": "?", "question_type": kind, "answer": answer}, free)
            for dataset, kind, answer in (
                ("IIIT5K", "Regular Text Recognition", ["red"]),
                ("HME100k", "Handwritten Mathematical Expression Recognition", ["x²+1"]),
                ("SROIE", "Key Information Extraction", ["1,000", "Main St."]),
            )
        ],
        "chartqa": [
            ({"type": kind, "question": "?", "answer": answer}, free)
            for kind, answer in (
                ("human_test", "2"),
                ("augmented_test", "50%"),
                ("human_test", "red"),
                ("human_test", "0"),
            )
        ],
        "docvqa": [({"questionId": "1", "docId": "2", "question": "?", "answers": ["Pepsi Cola", "Main St."]}, free)],
        "infovqa": [({"questionId": "1", "image_url": "u", "question": "?", "answers": ["50%", "red"]}, free)],
        "ai2d": [({"question": "?", "options": texts, "answer": str(right)}, choice) for right in (0, 1)],
        "scienceqa": [
            (
                {"question": "?", "choices": texts, "answer": right, "hint": "", "subject": "s", "grade": "grade1"},
                choice,
            )
            for right in (0, 1)
        ],
        "seed": [
            (
                {
                    **ids,
                    "question": "?",
                    **{f"choice_{letter}": text for letter, text in zip("abcd", texts, strict=True)},
                    "answer": right,
                    "data_id": "1",
                    "data_type": "image",
                    "question_type_id": 1,
                },
                choice,
            )
            for right in "AB"
        ],
        "cv-bench": [
            (
                {
                    "idx": 1,
                    "type": "2D",
                    "task": "Count",
                    "question": "?",
                    "choices": texts,
                    "answer": f"({right})",
                    "prompt": "?",
                    "source": "COCO",
                },
                choice,
            )
            for right in "AB"
        ],
        "mmvp": [
            (
                {"Index": 1, "Question": "?", "Options": "(a) Open (b) Closed", "Correct Answer": right},
                choice_answers(["Open", "Closed"], 1),
            )
            for right in ("(a)", "(b)")
        ],
        "realworldqa": [
            ({"question": "Which?\nA. a cat\nB. the dog\nC. No animal\nD. both", "answer": "B"}, choice),
            ({"question": "How many?", "answer": "2"}, free),
            ({"question": "Which way?", "answer": "Red"}, free),
        ],
        "mmmu": [
            (
                {
                    "id": "validation_Math_1",
                    "question": "?",
                    "options": str(texts),
                    "answer": "B",
                    "question_type": "multiple-choice",
                },
                choice,
            ),
            *(
                (
                    {
                        "id": "validation_Math_2",
                        "question": "?",
                        "options": "[]",
                        "answer": answer,
                        "question_type": "open",
                    },
                    free,
                )
                for answer in ("2", "red", "1,000")
            ),
        ],
        "pope": [
            ({**ids, "question": "?", "answer": answer, "image_source": "i", "category": "random"}, list(YES_NO))
            for answer in ("yes", "no")
        ],
        "mme": [
            ({"question_id": "1", "question": "?", "answer": answer, "category": "existence"}, list(YES_NO))
            for answer in ("Yes", "No")
        ],
    }
    return {name: [(row, answer) for row, answers in own for answer in answers] for name, own in rows.items()}


def main() -> int:
    """Print a line a benchmark and the first differences; exit 1 where there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", type=Path, help="A Python that has lmms-eval; made under runs/ if left out.")
    parser.add_argument("--benchmarks", help="Some of them, with commas between.")
    arguments = parser.parse_args()
    python = arguments.peer_python
    if python is None:
        python, done = make_peer_python(ROOT / "runs" / "bench" / "lmms-eval", further=SCORER_PACKAGES)
        print(done)
        if python is None:
            return 0
    chosen = arguments.benchmarks.split(",") if arguments.benchmarks else None
    asked = {name: items for name, items in cases().items() if chosen is None or name in chosen}
    lines = "".join(json.dumps({"benchmark": name, "items": items}) + "\n" for name, items in asked.items())
    scored = subprocess.run([str(python), str(WORKER)], input=lines, capture_output=True, text=True, check=False)
    theirs = [json.loads(line) for line in scored.stdout.splitlines()]
    if len(theirs) != len(asked):
        raise SystemExit("lmms-eval did not score them all:\n" + "\n".join(scored.stderr.splitlines()[-8:]))
    found = 0
    print("| benchmark | answers | different |\n| --- | --- | --- |")
    for (name, items), scores in zip(asked.items(), theirs, strict=True):
        grade = find_benchmark(name).grade
        different = []
        for (row, answer), score in zip(items, scores, strict=True):
            ours = grade({"id": "1", "row_number": 0, **row}, answer, "lmms").score
            if abs(ours - score) > 1e-9:
                different.append((answer, row.get("answer", row.get("answers", "")), score, ours))
        found += len(different)
        print(f"| {name} | {len(items)} | {len(different)} |", flush=True)
        for answer, reference, score, ours in different[:SHOWN]:
            print(f"  {answer!r} for {reference!r}: lmms-eval {score:g}, ours {ours:g}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
