"""The bundle of a toy model answers as torch does, token for token, and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyeyes.errors import RecordError
from manyeyes.export.parity import measure_parity
from manyeyes.model import load_checkpoint
from manyeyes.runtime.bundle import Bundle, Group
from manyeyes.runtime.chat import CHAT_TEMPLATES, encode_conversation
from manyeyes.runtime.sessions import CPU
from tests.export_toys import Toy, make_groups, picture


def test_bundle_answers_as_torch_token_for_token(toy_bundle: Toy) -> None:
    report = measure_parity(toy_bundle.checkpoint, toy_bundle.bundle, make_groups(), items=1000, max_new_tokens=8)
    assert report.items == sum(len(group.questions) for group in make_groups())
    assert report.token_match == 1.0, report.mismatches
    assert report.max_abs_logit < 1e-3
    assert report.mean_abs_logit <= report.max_abs_logit
    assert report.providers == [CPU]


def test_answers_differ_and_some_end_before_the_limit(loaded_bundle: Bundle) -> None:
    """Else equality with torch would say little."""
    answers = [answer for group in loaded_bundle.answer_groups(make_groups(), max_new_tokens=8) for answer in group]
    lengths = {len(answer.token_ids) for answer in answers}
    assert len({answer.token_ids for answer in answers}) > len(answers) / 2
    assert 8 in lengths
    assert min(lengths) < 8
    of_images = loaded_bundle.answer_groups([Group((picture(seed),), ("red?",)) for seed in range(8)], max_new_tokens=8)
    assert len({group[0].token_ids for group in of_images}) > 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_and_order_change_nothing(loaded_bundle: Bundle, batch_size: int) -> None:
    groups = make_groups()
    whole = loaded_bundle.answer_groups(groups, max_new_tokens=8, first_logits=True)
    parts = loaded_bundle.answer_groups(groups[::-1], max_new_tokens=8, batch_size=batch_size, first_logits=True)[::-1]
    for of_whole, of_parts in zip(whole, parts, strict=True):
        assert [answer.token_ids for answer in of_whole] == [answer.token_ids for answer in of_parts]
        for one, other in zip(of_whole, of_parts, strict=True):
            np.testing.assert_allclose(one.first_logits, other.first_logits, atol=1e-4)


def test_an_image_runs_once_however_often_it_is_asked_about(
    loaded_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    run = loaded_bundle._vision._graph.run

    def count(inputs: Any, **options: Any) -> Any:
        seen.append(len(inputs["vit"]))
        return run(inputs, **options)

    monkeypatch.setattr(loaded_bundle._vision._graph, "run", count)
    image = picture(0)
    loaded_bundle.answer_groups([Group((image,), ("a?", "b?", "c?")), Group((image, picture(1)), ("d?",))])
    assert seen == [2]


def test_one_answer_equals_its_place_in_a_group(loaded_bundle: Bundle) -> None:
    image = picture(4)
    group = loaded_bundle.answer_groups([Group((image,), ("red?", "what colour is the circle?"))], max_new_tokens=8)[0]
    assert loaded_bundle.answer("what colour is the circle?", images=[image], max_new_tokens=8) == group[1].text
    assert group[0].first_logits is None


def test_answers_end_where_the_models_length_ends(loaded_bundle: Bundle, toy_bundle: Toy) -> None:
    """96 tokens in all: a long question leaves little room, a longer one none."""
    _, processor = load_checkpoint(toy_bundle.checkpoint)

    def length(question: str) -> int:
        turns = [("human", f"<image>\n{question}")]
        return len(
            encode_conversation(
                processor.rust_tokenizer,
                CHAT_TEMPLATES["vicuna_v1"],
                turns,
                image_tokens=[4],
                image_token_id=0,
                system="",
                generation_prompt=True,
            ).input_ids
        )

    free = 96 - length("x")
    almost = "x" + "!" * (free - 2)
    assert length(almost) == 94
    answer = loaded_bundle.answer_groups([Group((picture(0),), (almost, "red?"))], max_new_tokens=8)[0]
    assert len(answer[0].token_ids) <= 2
    report = measure_parity(
        toy_bundle.checkpoint, toy_bundle.bundle, [Group((picture(0),), (almost, "red?"))], items=2, max_new_tokens=8
    )
    assert report.token_match == 1.0
    with pytest.raises(RecordError, match="96 tokens long"):
        loaded_bundle.answer(almost + "!!", images=[picture(0)])


@pytest.mark.parametrize(
    ("question", "images", "limit", "message"),
    [
        ("<image> what?", (), 4, "holds <image>"),
        ("what?", (b"no image",), 4, "not an image"),
        ("what?", (), 0, "max_new_tokens is 0"),
    ],
)
def test_bad_questions_are_refused(
    loaded_bundle: Bundle, question: str, images: tuple[bytes, ...], limit: int, message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        loaded_bundle.answer(question, images=images, max_new_tokens=limit)


def test_no_groups_give_no_answers(loaded_bundle: Bundle) -> None:
    assert loaded_bundle.answer_groups([]) == []
    assert loaded_bundle.answer_groups([Group((), ())]) == [[]]


ANSWERS_WITHOUT_TORCH = """
import importlib.abc, json, sys

REFUSED = {"torch", "transformers", "timm", "kfp", "mlflow", "pandas", "pyarrow", "onnx", "onnxscript"}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ImportError(f"{name} is refused")

sys.meta_path.insert(0, Refuse())
from pathlib import Path
from manyeyes.runtime.bundle import Group, load_bundle

bundle = load_bundle(sys.argv[1], threads=1)
image = Path(sys.argv[2]).read_bytes()
groups = [Group((image,), ("red?", "what colour is the circle?"))]
answers = bundle.answer_groups(groups, max_new_tokens=8)
print(json.dumps([list(answer.token_ids) for answer in answers[0]]))
assert not REFUSED & {name.partition(".")[0] for name in sys.modules}
"""


def test_a_process_that_refuses_torch_answers_the_same(toy_bundle: Toy, loaded_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(picture(2))
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS_WITHOUT_TORCH, str(toy_bundle.bundle), str(tmp_path / "image.png")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    here = loaded_bundle.answer_groups(
        [Group((picture(2),), ("red?", "what colour is the circle?"))], max_new_tokens=8
    )[0]
    assert json.loads(done.stdout) == [list(answer.token_ids) for answer in here]
