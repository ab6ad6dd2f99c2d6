"""Rows in the hub's columns, and answers that models write and parsers stumble over, for ``bench.scorers``.

Written answers are letters in brackets, whole sentences, several letters, numbers with units, other cases, nothing at
all. Random ones, from a fixed seed, join pieces of those with spaces, line ends and marks of many kinds.
"""

from __future__ import annotations

import random
from typing import Any

RANDOM_ANSWERS = 400
"""For each row."""
SEED = 0

LETTERS = (
    "{letter}", "{lower}", "({letter})", "{letter}.", "{letter})", " {letter} \n", "{letter}: {text}",
    "{letter}. {text}", "({lower}) {text}", "The answer is {letter}.", "The answer is ({letter}).", "Answer: {letter}",
    "Option {letter}", "I think it is {letter}, not {other}.", "{letter} and {other}", "{other} or {letter}",
    "**{letter}**", "Between {other} and {letter} the best answer is {letter}.", "{text}", "{text}.",
    "It shows {text} in the middle.", "{letter}{other}", "\\boxed{{{letter}}}", "{letter},", "'{letter}'",
    "answer is {lower}", "{letter}\n{text}", "A good question. {letter}", "The answer is {letter}, not {other}.",
    "the correct ANSWER  is *{letter}* as {other} is no", "answer is **{lower}** and that is all there is",
    "the answer is {text}", "{letter}\n", "\t{letter}", "I cannot tell.", "Because of this.", "", " ", ".", "E", "Z",
    "(Z)", "1", "{number}",
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

LETTERS_ALONE = (*"ABCDEabcdeZ", "A", "B", "C", "D")
SPACES = ("", "", " ", " ", " ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u2028", "\u3000", "\x1f")
PIECES = (
    "answer is", "The answer is", "the correct answer is", "ANSWER IS", "answer  is", "answer\nis", "answer:",
    "Answer:", "option", "choice is", "I choose", "The best answer is", "is", "so", "final", "=", "**", "*", "__", "(",
    ")", "[", "]", "{", "}", ".", ",", ":", ";", "!", "?", "'", '"', "`", "-", "/", "\\", "%", "$", "#", "@", "&",
    "yes", "no", "Yes", "No", "not", "none", "two", "10", "2", "-2", "0", "1e3", "1.5", "1,000", "3.", ".5", "50%",
    "nan", "inf", "1_000", "a", "an", "the", "dont", "'s", "İ", "ß", "ﬁ", "é", "e\u0301", "\uff12", "\uff21", "٣", "²",
    "红", "😀", "Cannot determine the answer", "I can't process this file.", "Failed to obtain answer via API",
    "Other Answers", "Because", "A cat", "<think>",
)  # fmt: skip

_MATHVISTA = {
    "pid": "1",
    "question": "?",
    "query": "?",
    "choices": None,
    "precision": None,
    "question_type": "free_form",
    "image": "images/1.jpg",
    "metadata": {"task": "t", "skills": ["s"]},
}


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


def random_answers_around(draw: random.Random, answers: list[str], *, count: int) -> list[str]:
    """Pieces of written answers and of ``PIECES``, joined at random."""
    words = sorted({word for answer in answers for word in answer.split()}) + answers
    made = []
    for _ in range(count):
        joined = ""
        for _ in range(draw.randint(1, 7)):
            joined += draw.choice(draw.choice((PIECES, words, LETTERS_ALONE))) + draw.choice(SPACES)
        made.append(joined)
    return made


def cases(*, random_answers: int = RANDOM_ANSWERS) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """By benchmark its rows, each with every written answer and this many random ones."""
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
        "mmbench": [
            (
                {
                    "index": number,
                    "question": "?",
                    "hint": "nan",
                    "answer": right,
                    **dict(zip("ABCD", shown, strict=True)),
                    "category": "c",
                    "L2-category": "l",
                },
                choice,
            )
            for number, (right, shown) in enumerate(
                (("B", texts), ("A", texts), ("A", ["Yes", "No", "nan", "nan"]), ("C", ["a", "b", "B", "nan"]))
            )
        ],
        "mathvista": [
            *(
                (
                    {
                        **_MATHVISTA,
                        "choices": shown,
                        "answer": shown[right],
                        "question_type": "multi_choice",
                        "answer_type": "text",
                    },
                    choice_answers(shown, right),
                )
                for shown, right in ((texts, 1), (["2", "10", "2.5", "50%", "1,000", "none"], 0), (["A", "B"], 1))
            ),
            *(
                ({**_MATHVISTA, "answer": answer, "answer_type": kind, "precision": precision}, free)
                for answer, kind, precision in (
                    ("2", "integer", None),
                    ("0", "integer", None),
                    ("1000", "integer", None),
                    ("1.5", "float", 1.0),
                    ("0.05", "float", 2.0),
                    ("[2, 10]", "list", None),
                )
            ),
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
                for answer in ("2", "red", "1,000", "B")
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
    draw = random.Random(SEED)
    return {
        name: [
            (row, answer)
            for row, answers in own
            for answer in [*answers, *random_answers_around(draw, answers, count=random_answers)]
        ]
        for name, own in rows.items()
    }
