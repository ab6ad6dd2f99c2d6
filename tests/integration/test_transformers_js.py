"""transformers.js opens a bundle that is shaped like LLaVA, and answers as we do. Install it: .ci/transformers_js."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from manyeyes.recipe import change_recipe, load_recipe
from manyeyes.runtime.bundle import Group, load_bundle
from tests.export_toys import Toy, make_toy, picture

FOLDER = Path(__file__).parent / "transformers_js"
NODE = shutil.which("node")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(NODE is None, reason="no Node: apt-get install nodejs"),
    pytest.mark.skipif(not (FOLDER / "node_modules").is_dir(), reason="no transformers.js: run .ci/transformers_js"),
]

VARIANTS = {
    "int8": {"vision": "int8", "embed": "int8", "decoder": "int8"},
    "int4": {"vision": "int8", "embed": "int4", "decoder": "int4"},
}
DTYPES = {
    "default": None,
    "int8": "int8",
    "int4": {"vision_encoder": "int8", "embed_tokens": "q4", "decoder_model_merged": "q4"},
}
QUESTIONS = ("what colour is the circle?", "  red? ", "é🙂", "yes or no,\nand why?")
MOST_TOKENS = 12


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    changes = {"export.variants": VARIANTS, "gate": [{"rule": "precision", "margin": -2}]}
    toy = make_toy(
        tmp_path_factory.mktemp("known"),
        change_recipe(load_recipe("tiny"), changes),
        encoders={"vit": "vit-tiny-p16-64"},
    )
    assert toy.manifest.ours_alone == []
    return toy


def ask(bundle: Path, dtype: Any, questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers of transformers.js."""
    assert NODE is not None
    done = subprocess.run(
        [NODE, "answer.mjs", str(bundle), json.dumps(dtype)],
        cwd=FOLDER,
        input=json.dumps(questions),
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


@pytest.mark.parametrize("variant", DTYPES)
def test_transformers_js_writes_our_tokens(toy: Toy, tmp_path: Path, variant: str) -> None:
    """Images have the size of the input: what comes of resizing them differs between libraries."""
    # It reads prompts with the graph that writes.
    ours = load_bundle(toy.bundle, variant=variant, threads=1, prefill=False)
    images = [picture(seed) for seed in range(8)]
    groups = [Group((image,), (QUESTIONS[seed % 4],)) for seed, image in enumerate(images)]
    groups.append(Group((), ("no image at all?",)))
    asked = []
    for place, group in enumerate(groups):
        file = tmp_path / f"{place}.png"
        file.write_bytes(b"".join(group.images))
        image = str(file) if group.images else None
        asked.append({"question": group.questions[0], "image": image, "max_new_tokens": MOST_TOKENS})
    found = ask(toy.bundle, DTYPES[variant], asked)
    expected = [answers[0] for answers in ours.answer_groups(groups, max_new_tokens=MOST_TOKENS)]
    stops = set(json.loads((toy.bundle / "chat.json").read_text(encoding="utf-8"))["stop_token_ids"])
    assert [tuple(token for token in one["token_ids"] if token not in stops) for one in found] == [
        one.token_ids for one in expected
    ]
    assert len({one.token_ids for one in expected}) > 3, "the toy looks at its images and questions"
    for one, group in zip(found, groups, strict=True):
        assert one["prompt"].count(0) == 4 * len(group.images)


def test_an_image_of_another_shape_is_padded_to_the_middle_and_read(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "wide.png").write_bytes(picture(1, 150, 50))
    (answer,) = ask(
        toy.bundle, None, [{"question": "red?", "image": str(tmp_path / "wide.png"), "max_new_tokens": MOST_TOKENS}]
    )
    assert answer["token_ids"]
