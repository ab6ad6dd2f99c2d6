"""Bundles that make no sense and whose checksums are right, drawn from a seed."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from manyeyes.errors import ManyEyesError
from manyeyes.runtime.bundle import load_bundle
from manyeyes.runtime.bundle_contents import CHAT, DECODER, EMBED, MANIFEST, PREPROCESS, TOKENIZER, VISION, digest_files
from tests.export_toys import picture, rewrite_manifest

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 2**31, 2**63, 2**64, 10**400, 1e308, -0.5, 0.5, 1.5, "", "x", "xxx", "\ud7ff"),
    *("</s>", "<image>", "../x", "n" * 5000, [], {}, [[]], [None], [1, 2, 3], [1e9] * 3, {"a": 1}, ["x"] * 1000),
)
TEXTS = (
    "",
    "{",
    "[]",
    "null",
    "NaN",
    '{"a": NaN}',
    "[" * 100_000,
    '{"a":' * 50_000,
    "9" * 5000,
    '"\\ud800"',
    "\ufeff{}",
)
PARTS: tuple[dict[str, Any], ...] = (
    *({"type": "Precompiled", "precompiled_charsmap": map_} for map_ in ("", "AAAA", "/////w==", "AAAAAAAAAAAAAAAA")),
    {"type": "Sequence", "normalizers": []},
    {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"},
    {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1000},
    {"type": "FixedLength", "length": 0},
    {"type": "Metaspace", "replacement": "__", "prepend_scheme": "always", "split": True},
    {"type": "Strip", "content": "x", "start": 2**40, "stop": 2**40},
)
MODELS: tuple[dict[str, Any], ...] = (
    {"type": "WordLevel", "vocab": {}, "unk_token": "<unk>"},
    {"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "a"},
    {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]], "byte_fallback": True},
    {"type": "Unigram", "unk_id": None, "vocab": [], "byte_fallback": False},
    {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]},
    # Ends the process that reads it.
    {"type": "BPE", "vocab": {"a": 0, "é": 1, "aé": 2}, "merges": [["a", "é"]], "continuing_subword_prefix": "x"},
)


def tampered(bundle: Path, folder: Path, *, seed: int, count: int) -> Iterator[tuple[str, Path]]:
    """Copies of a bundle, each changed in one place and with checksums that are right.

    Args:
        bundle: A good one.
        folder: For the copies; each is deleted before the next.
        seed: The same seed gives the same changes.
        count: How many.

    Yields:
        What was changed, and the copy.
    """
    rng = random.Random(seed)
    kinds: tuple[Callable[[random.Random, Path], str], ...] = (
        *(_change_json,) * 6,
        *(_replace_text, _change_tokenizer, _change_tokenizer, _change_manifest, _change_manifest, _change_graph),
        _ask_for_memory,
    )
    copied = folder / "tampered"
    for number in range(count):
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(bundle, copied)
        # Every kind comes early, so that a short run sees all of them.
        change = kinds[number % len(kinds)] if number < 2 * len(kinds) else rng.choice(kinds)
        yield change(rng, copied), copied


def use(bundle: Path) -> str:
    """Load a bundle and ask it something.

    Returns:
        ``answers``, or the name of our error; anything else is raised.
    """
    try:
        loaded = load_bundle(bundle, threads=1)
    except ManyEyesError as error:
        return f"load: {type(error).__name__}"
    try:
        loaded.answer("what colour?", images=[picture(1, 70, 50)], max_new_tokens=4)
        loaded.answer("é🙂 and no image?", max_new_tokens=2)
    except ManyEyesError as error:
        return f"answer: {type(error).__name__}"
    return "answers"


def _change_json(rng: random.Random, bundle: Path) -> str:
    name = rng.choice((CHAT, PREPROCESS))
    content, what = _changed(rng, json.loads((bundle / name).read_text(encoding="utf-8")))
    _write(bundle / name, content)
    rewrite_manifest(bundle)
    return f"{name}: {what}"


def _replace_text(rng: random.Random, bundle: Path) -> str:
    name, text = rng.choice((CHAT, PREPROCESS, TOKENIZER)), rng.choice(TEXTS)
    (bundle / name).write_bytes(rng.choice((text.encode(), text.encode("utf-16"), b"\xff\xfe\x80" + text.encode())))
    rewrite_manifest(bundle)
    return f"{name} is {text[:20]!r}"


def _change_tokenizer(rng: random.Random, bundle: Path) -> str:
    content = json.loads((bundle / TOKENIZER).read_text(encoding="utf-8"))
    part = rng.choice(
        ("model", "normalizer", "pre_tokenizer", "decoder", "post_processor", "anything", "padding", "deep")
    )
    what = part
    if part == "model":
        content["model"] = rng.choice(MODELS)
    elif part == "anything":
        content, what = _changed(rng, content)
    elif part == "padding":
        padding = {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
        content["padding"] = {**padding, "pad_type_id": 0, "pad_token": "x"}
    elif part == "deep":
        for _ in range(rng.choice((100, 200, 400))):
            content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"]]}
    else:
        content[part] = rng.choice(PARTS)
    _write(bundle / TOKENIZER, content)
    rewrite_manifest(bundle)
    return f"{TOKENIZER}: {what} {str(content.get(part))[:60]}"


def _change_manifest(rng: random.Random, bundle: Path) -> str:
    content = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    what = rng.choice(("entry", "name", "field"))
    if what == "entry":
        content["files"][rng.choice(list(content["files"]))] = rng.choice(VALUES)
    elif what == "name":
        name = rng.choice(("n" * 5000, "..", "", "a/b", "onnx/a/b", "a\0b", "é" * 200, CHAT.upper()))
        content["files"][name] = {"sha256": "0" * 64, "bytes": 0}
    else:
        content, what = _changed(rng, content)
    with contextlib.suppress(AttributeError, KeyError, TypeError):  # it may be no list of files any more
        content["digest"] = digest_files(content["files"])
    _write(bundle / MANIFEST, content)
    return f"{MANIFEST}: {what}"


def _change_graph(rng: random.Random, bundle: Path) -> str:
    name = rng.choice((VISION, EMBED, DECODER))
    data = bytearray((bundle / name).read_bytes())
    what = rng.choice(("bytes", "cut", "other", "empty"))
    if what == "bytes":
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del data[rng.randrange(len(data)) :]
    elif what == "other":
        data = bytearray((bundle / rng.choice((VISION, EMBED, DECODER, CHAT))).read_bytes())
    else:
        data = bytearray()
    (bundle / name).write_bytes(data)
    rewrite_manifest(bundle)
    return f"{name}: {what}"


def _ask_for_memory(rng: random.Random, bundle: Path) -> str:
    rows = rng.choice((2**34, 2**40, 2**62))
    ask_for_memory(bundle, rows)
    return f"{EMBED} asks for {rows} rows"


def ask_for_memory(bundle: Path, rows: int) -> None:
    """Make the embedding table one of this many rows, which the graph fills itself."""
    width = onnx.load(bundle / EMBED).graph.output[0].type.tensor_type.shape.dim[2].dim_value
    shape = numpy_helper.from_array(np.array([rows, width], np.int64), "shape")
    graph = helper.make_graph(
        [
            helper.make_node("ConstantOfShape", ["shape"], ["table"]),
            helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"]),
        ],
        "embed",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "query"])],
        [helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, ["batch_size", "query", width])],
        [shape],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), bundle / EMBED)
    rewrite_manifest(bundle)


def _changed(rng: random.Random, content: Any) -> tuple[Any, str]:
    content = copy.deepcopy(content)
    path = rng.choice(list(_paths(content)))
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    what = rng.choice(("value", "value", "value", "value", "gone", "more"))
    if what == "gone":
        del holder[path[-1]]
    elif what == "more" and isinstance(holder, dict):
        holder["more"] = rng.choice(VALUES)
    else:
        holder[path[-1]] = rng.choice(VALUES)
        what = f"{holder[path[-1]]!r:.40}"
    return content, f"{'.'.join(map(str, path))} {what}"


def _paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(pairs)[:40]:
        yield (*path, key)
        yield from _paths(value, (*path, key))


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
