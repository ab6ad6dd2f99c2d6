"""Rows in each benchmark's own schema, written for the tests; their images are one red dot.

``FIXTURES`` has the rows that every benchmark is swept with (tests/contract/test_benchmark_rows.py).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
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


def vqav2(**values: Any) -> dict[str, Any]:
    return {
        "question_id": 1,
        "image_id": 1,
        "question": "What is it?",
        "question_type": "what is",
        "answer_type": "other",
        "multiple_choice_answer": "cat",
        "answers": [{"answer": "cat", "answer_confidence": "yes", "answer_id": place} for place in range(1, 11)],
        **values,
    }


def gqa(**values: Any) -> dict[str, Any]:
    return {"id": "201", "imageId": "n1", "question": "Is it overcast?", "answer": "yes", **values}


def vizwiz(**values: Any) -> dict[str, Any]:
    return {
        "question_id": "VizWiz_val_1.jpg",
        "question": "what is in this can?",
        "answers": ["soup"] * 10,
        "category": "other",
        **values,
    }


def textvqa(**values: Any) -> dict[str, Any]:
    return {
        "question_id": 34602,
        "image_id": "0054c91397f2fe05",
        "question": "what is the brand?",
        "answers": ["nokia"] * 10,
        "ocr_tokens": ["NOKIA", "1912"],
        **values,
    }


def ocrbench(**values: Any) -> dict[str, Any]:
    return {
        "dataset": "IIIT5K",
        "question": "what is written in the image?",
        "question_type": "Regular Text Recognition",
        "answer": ["CENTRE"],
        **values,
    }


def chartqa(**values: Any) -> dict[str, Any]:
    return {"type": "human_test", "question": "How many bars are there?", "answer": "14", **values}


def docvqa(**values: Any) -> dict[str, Any]:
    return {
        "questionId": "49153",
        "docId": 14465,
        "question": "What is the date?",
        "answers": ["Jan 8, 1993", "1/8/93"],
        **values,
    }


def infovqa(**values: Any) -> dict[str, Any]:
    return {
        "questionId": "98313",
        "question": "Which city is the largest?",
        "answers": ["Lagos"],
        "image_url": "https://example.org/1.png",
        **values,
    }


def llava_bench(answer: str, **values: Any) -> dict[str, Any]:
    return {
        "question_id": 0,
        "question": "What is it?",
        "image_id": "001",
        "category": "conv",
        "caption": "A volcano.",
        answer: "Diamond Head.",
        **values,
    }


def mm_vet(**values: Any) -> dict[str, Any]:
    return {
        "question_id": "v1_0",
        "question": "What is x?",
        "answer": "-1<AND>-5",
        "image_source": "identity",
        "capability": "ocr,math",
        **values,
    }


def easy_vqa(**values: Any) -> dict[str, Any]:
    turns = (("human", "<image>\nwhat shape is it?"), ("gpt", "circle"), ("human", "is it red?"), ("gpt", "yes"))
    return {
        "id": "easy-vqa/test/0",
        "conversations": [{"from": speaker, "value": text} for speaker, text in turns],
        **values,
    }


@dataclass(frozen=True)
class Fixture:
    """A few rows of one benchmark, and answers to their questions.

    Attributes:
        rows: In the hub's schema, images too.
        right: One answer a question that every variant takes for right. Of a benchmark that a language model judges:
            what the judge writes about a perfect answer.
        wrong: One that every variant takes for wrong; what the judge writes about a useless answer.
        best: The score of right answers where it is not the benchmark's maximum.
    """

    rows: list[dict[str, Any]]
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    best: float | None = None

    @property
    def answered(self) -> list[tuple[dict[str, Any], str]]:
        """The rows without their images, as references have them, each with its right and with its wrong answer."""
        return [
            ({column: value for column, value in row.items() if value not in (DOT, [DOT])}, said)
            for answers in (self.right, self.wrong)
            for row, said in zip(self.rows, answers, strict=True)
        ]


DOT = dot()

# By name of the benchmark.
FIXTURES: dict[str, Fixture] = {
    "vqav2": Fixture([vqav2(image=DOT), vqav2(question_id=2, image=DOT)], ("cat", "cat"), ("dog", "2")),
    "gqa": Fixture([gqa(image=DOT), gqa(id="202", answer="red", image=DOT)], ("yes", "red"), ("no", "dark red")),
    "vizwiz": Fixture(
        [vizwiz(image=DOT), vizwiz(question_id="2", answers=["unanswerable"] * 10, image=DOT)],
        ("soup", "unanswerable"),
        ("beans", "soup"),
    ),
    "textvqa": Fixture([textvqa(image=DOT), textvqa(question_id=2, image=DOT)], ("nokia", "Nokia"), ("sony", "1912")),
    "ocrbench": Fixture(
        [
            ocrbench(image=DOT),
            ocrbench(
                image=DOT,
                dataset="HME100k",
                question_type="Handwritten Mathematical Expression Recognition",
                answer=["x ^ { 2 }"],
            ),
        ],
        ("It says centre.", "x^{2}"),
        ("It says center.", "x^{3}"),
    ),
    "chartqa": Fixture(
        [chartqa(image=DOT), chartqa(type="augmented_test", answer="Peru", image=DOT)], ("14", "peru"), ("41", "Chile")
    ),
    "docvqa": Fixture([docvqa(image=DOT), docvqa(questionId="2", image=DOT)], ("jan 8, 1993", "1/8/93"), ("May", "no")),
    "infovqa": Fixture([infovqa(image=DOT), infovqa(questionId="2", image=DOT)], ("lagos", "Lagos"), ("Cairo", "2")),
    "ai2d": Fixture([ai2d(image=DOT), ai2d(image=DOT, answer="2")], ("B", "C"), ("A", "A")),
    "scienceqa": Fixture([scienceqa(image=DOT), scienceqa(image=DOT, hint="", answer=0)], ("B", "A"), ("A", "B")),
    # Points of one category of ten.
    "mme": Fixture([mme(image=DOT), mme(image=DOT, answer="No")], ("yes", "no"), ("no", "yes"), best=200),
    "mmbench": Fixture(
        [mmbench(7, image=DOT), mmbench(1_000_007, image=DOT, answer="B", A="cat", B="dog")], ("A", "B"), ("B", "A")
    ),
    "seed": Fixture([seed(image=[DOT]), seed(question_id="102", image=[DOT], answer="D")], ("B", "D"), ("A", "A")),
    "mathvista": Fixture(
        [
            mathvista(decoded_image=DOT),
            mathvista(
                pid="2",
                decoded_image=DOT,
                choices=["3 cm", "4 cm"],
                question_type="multi_choice",
                answer_type="text",
                answer="4 cm",
            ),
        ],
        ("14", "B"),
        ("15", "A"),
    ),
    "mmmu": Fixture(
        [
            {**mmmu(), **{f"image_{n}": DOT if n < 3 else None for n in range(1, 8)}},
            {
                **mmmu(id="validation_Math_2", question_type="open", options="[]", answer="Paris"),
                **{f"image_{n}": DOT if n == 1 else None for n in range(1, 8)},
            },
        ],
        ("B", "Paris"),
        ("A", "London"),
    ),
    "pope": Fixture([pope(image=DOT), pope(image=DOT, question_id="2", answer="no")], ("yes", "no"), ("no", "yes")),
    "mmvp": Fixture([mmvp(1, image=DOT), mmvp(2, image=DOT, **{"Correct Answer": "(b)"})], ("A", "B"), ("B", "A")),
    "realworldqa": Fixture(
        [realworldqa(image=DOT), realworldqa(image=DOT, question="How many cars?", answer="2")], ("C", "2"), ("A", "3")
    ),
    "cv-bench": Fixture(
        [cv_bench(image=DOT), cv_bench(idx=1, image=DOT, type="3D", source="Omni3D", answer="(A)")],
        ("B", "A"),
        ("A", "B"),
    ),
    "llava-bench-coco": Fixture(
        [llava_bench("answer", image=DOT), llava_bench("answer", question_id=1, category="detail", image=DOT)],
        ("8 8\nBoth are right.", "10 10"),
        ("8 0\nThe second says nothing.", "10 0"),
    ),
    "llava-bench-wild": Fixture(
        [llava_bench("gpt_answer", image=DOT), llava_bench("gpt_answer", question_id=1, category="complex", image=DOT)],
        ("8 8", "10 10"),
        ("8 0", "10 0"),
    ),
    "mm-vet": Fixture(
        [mm_vet(image=DOT), mm_vet(question_id="v1_1", capability="rec", image=DOT)], ("1.0", "1.0"), ("0.0", "0.0")
    ),
    "easy-vqa": Fixture([easy_vqa(images=[DOT])], ("circle", "Yes."), ("triangle", "no")),
}
