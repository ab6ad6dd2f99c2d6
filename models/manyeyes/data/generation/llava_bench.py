"""LLaVA-Bench of one's own images: three questions on each, with references, in the columns of the published one.

Of each image a conversation, a description and a question that takes thought are asked for, as for training; the first
question of each is kept, and the reference is answered anew from captions and boxes, as GPT-4 did for the paper.

Source: LLaVA, arXiv:2304.08485, section 5.1: 30 images of COCO, 90 questions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.generation.dataset import (
    REPORT_FILE,
    GenerationReport,
    RefusedFile,
    UnusableItem,
    work_through,
)
from manyeyes.data.generation.descriptions import Description, load_image
from manyeyes.data.generation.interview import Asking, Prompt, RefusedError
from manyeyes.data.generation.llava import KINDS, check_voice, detail_question
from manyeyes.data.generation.llava_prompts import COMPLEX, DETAIL
from manyeyes.storage import new_folder, write_file
from manyeyes.web.chat_client import ChatClient

NAME = "llava-bench-coco"
"""The benchmark whose columns and judge these questions have; the data set bears it, so that it is found."""

IMAGES = 30
_SPLIT = "train"
_CATEGORIES = {"conv": "conversation", "detail": "detail", "complex": "complex"}

REFERENCE = Prompt(
    name="reference 1",
    system=(
        "You get to know one image through a few sentences that describe it, and through objects with their places: "
        "left, top, right and bottom, as shares of the width and height of the image. A question about the image "
        "follows. Answer it helpfully, correctly and in as much detail as it calls for, as somebody who looks at the "
        "image: never mention captions, sentences, descriptions, boxes or coordinates. Say nothing that does not "
        "follow from what you get."
    ),
    examples=(
        (
            f"{COMPLEX.examples[1][0]}\n\nQuestion: How many children watch the dog?",
            "Three children watch it; they stand close together on a wooden pier.",
        ),
        (
            f"{DETAIL.examples[2][0]}\n\nQuestion: What is odd about this kitchen?",
            "A bicycle leans against the oven. In so narrow a room it takes up much of the floor, and the oven can "
            "hardly be opened while it stands there.",
        ),
    ),
    temperature=0.2,
)

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_COLUMNS = ("question_id", "question", "image_id", "category", "answer")
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _COLUMNS),
        ("caption", pa.list_(pa.string())),
        ("image", _IMAGE),
    ],
    metadata={
        "huggingface": json.dumps(
            {
                "info": {
                    "features": {
                        **{name: {"dtype": "string", "_type": "Value"} for name in _COLUMNS},
                        "caption": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
                        "image": {"_type": "Image"},
                    }
                }
            }
        )
    },
)


def read_reference(text: str) -> str:
    """An answer that somebody who sees the image may have given.

    Raises:
        RefusedError: It is empty, or says where its knowledge comes from.
    """
    check_voice(text)
    if not text.strip():
        raise RefusedError("it is empty; an answer is needed")
    return text.strip()


def make_questions(item: Description, asking: Asking, *, images: Path) -> list[dict[str, Any]]:
    """Three rows: one question a category, with its reference.

    Raises:
        RefusedError: No captions, no image, or one of the answers cannot be read.
    """
    if not item.captions:
        raise RefusedError("it has no captions; at least one is needed")
    image = load_image(images, item.image)
    context = item.as_text(boxes=True)
    rows = []
    for category, kind in _CATEGORIES.items():
        # A description's question is drawn, not written.
        question = detail_question(item) if kind == "detail" else KINDS[kind](item, asking)[0][0]
        answer = asking.ask(REFERENCE, f"{context}\n\nQuestion: {question}", read_reference)
        rows.append(
            {
                "question_id": f"{item.id}-{category}",
                "question": question,
                "image_id": item.id,
                "category": category,
                "answer": answer,
                "caption": context.splitlines(),
                "image": {"bytes": image.data, "path": image.path},
            }
        )
    return rows


def question_maker(images: Path) -> Callable[[Description, Asking], list[dict[str, Any]]]:
    """``make_questions`` for one folder of images."""
    return partial(make_questions, images=images)


def draw_images(items: Iterable[Description | UnusableItem], count: int) -> list[Description | UnusableItem]:
    """As many of them as are asked about, drawn by their ids: the same ones in whatever order they come.

    Those that nothing can be asked about come behind them, to be refused with their reasons.
    """

    def place(item: Description | UnusableItem) -> bytes:
        return hashlib.sha256(item.id.encode(errors="surrogatepass")).digest()

    ordered = sorted(items, key=place)
    usable = [item for item in ordered if isinstance(item, Description) and item.captions]
    return [*usable[:count], *(item for item in ordered if not (isinstance(item, Description) and item.captions))]


def generate_questions(
    items: Iterable[Description | UnusableItem],
    client: ChatClient,
    *,
    images: Path,
    out: Path,
    licence: str,
    on_progress: Callable[[int, int], None] = lambda _done, _refused: None,
) -> GenerationReport:
    """Write the benchmark into a snapshot folder, and ``references.jsonl`` for ``manyeyes judge`` beside it.

    Args:
        items: What to ask about.
        client: Is asked.
        images: Folder that the images are below.
        out: The snapshot's folder; ``out/llava-bench-coco`` is replaced, the rest stays.
        licence: SPDX name.
        on_progress: Called with the numbers of images that are done and that were refused.

    Raises:
        ServiceError: The service cannot be asked, or it would cost more than it may.
        StorageError: No space or no permission.
    """
    rows: list[dict[str, Any]] = []
    prompts: dict[str, str] = {}
    with new_folder(out / NAME) as folder:
        refused = RefusedFile(folder)
        for done, outcome in enumerate(work_through(items, question_maker(images), client), start=1):
            prompts.update(outcome.prompts)
            if outcome.made is None:
                assert outcome.refusal is not None
                refused.add(outcome.id, outcome.source, outcome.refusal)
            rows += outcome.made or []
            on_progress(done, refused.count)
        if rows:
            pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), folder / f"{_SPLIT}-00000.parquet")
        told = [{name: value for name, value in row.items() if name != "image"} for row in rows]
        lines = [json.dumps({"id": row["question_id"], **row}, ensure_ascii=False) + "\n" for row in told]
        write_file(folder / "references.jsonl", "".join(lines))
        report = GenerationReport(
            kind="llava-bench",
            records=len(rows),
            refused=refused.count,
            refusals=dict(refused.steps.most_common()),
            prompts=dict(sorted(prompts.items())),
            service=client.use,
            cost=client.spent,
        )
        write_file(folder / REPORT_FILE, report.model_dump_json(indent=2) + "\n")
    served = ", ".join(report.service.served) or report.service.model
    how = f"questions and references by {served}, of images of the user's own"
    write_snapshot_manifest(out, provenance={f"{NAME}-{_SPLIT}": Provenance(licence, how, layout="hub")})
    return report
