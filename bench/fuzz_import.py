"""Broken images and odd records through ``data import``: ``bench.fuzz`` runs them.

Each item must be kept, or be in the quarantine with a reason; what is kept must be fit for validation too.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from bench.fuzz import broken_images
from bench.fuzz_records import SEED, odd_rows

_ODD_NAMES: tuple[Any, ...] = (None, "", "gone.jpg", "../0.img", 7, [], ["0.img"], {"path": "0.img"}, "\ud83d.jpg")


def _as_item(number: int, row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A row as a list in LLaVA's format might have it: its images are broken files."""
    conversations = row["conversations"]
    images = row["images"] or []
    item = {"id": row["id"], "source": row["source"], "conversations": conversations}
    if images:
        item["image"] = f"{number}.img" if len(images) == 1 else [f"{number}.img"] * len(images)
    if draw.random() < 0.1:
        item["image"] = draw.choice(_ODD_NAMES)
    if draw.random() < 0.1:
        del item[draw.choice(list(item))]
    return item


def _as_text(value: Any) -> Any:
    """Bytes that are no text as half of a surrogate pair, all the way down."""
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    if isinstance(value, list):
        return [_as_text(entry) for entry in value]
    return {key: _as_text(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def write_odd_source(folder: Path, number: int, *, seed: int = SEED) -> Path:
    """A list of odd items and the broken images that they name; each third image is whole."""
    from bench.fuzz import whole_images

    draw = random.Random(seed)
    whole = [data for name, data in whole_images().items() if name.startswith(("JPEG/RGB", "PNG/RGB"))]
    (folder / "images").mkdir(parents=True)
    for place, (_, _, data) in enumerate(broken_images(number, seed=seed)):
        (folder / "images" / f"{place}.img").write_bytes(draw.choice(whole) if place % 3 == 0 else data)
    items = [_as_item(place, _as_text(row), draw) for place, row in enumerate(odd_rows(number, draw))]
    path = folder / "odd.json"
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def fuzz_import(number: int, *, seed: int = SEED) -> tuple[Counter[str], list[str]]:
    """Import odd items, and validate what is kept.

    Args:
        number: How many.
        seed: The same seed gives the same items, with one version of Pillow.

    Returns:
        How many came to what, and a line for each fault.
    """
    from manyeyes.data.importing import import_data
    from manyeyes.data.profile import build_profile
    from manyeyes.data.snapshot import open_folder

    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
        folder = Path(name)
        source = write_odd_source(folder / "source", number, seed=seed)
        before = os.environ.get("MANYEYES_CACHE")
        os.environ["MANYEYES_CACHE"] = str(folder / "cache")
        try:
            report = import_data(str(source), folder / "out", images=str(source.parent / "images"), name="odd")
        finally:
            if before is None:
                del os.environ["MANYEYES_CACHE"]
            else:
                os.environ["MANYEYES_CACHE"] = before
        text = (folder / "out" / "odd" / "quarantine.jsonl").read_bytes().decode()
        lines = [json.loads(line) for line in text.split("\n") if line]
        profile = build_profile(open_folder(folder / "out"), ["odd-train"], eval_datasets=[])
    counts = Counter({"kept": report.kept, **{f"quarantined: {kind}": n for kind, n in report.reasons.items()}})
    put_aside = {line["row"] for line in lines}
    faults = [f"row {line['row']} has no reason" for line in lines if not line["reason"].strip()]
    faults += [
        f"{row.id} is kept, and validation says {row.problem}" for row in profile[profile["problem"] != ""].itertuples()
    ]
    if len(put_aside) != len(lines) or len(profile) + len(put_aside) != number or len(profile) != report.kept:
        faults.append(f"{number} items, {len(profile)} kept, {len(lines)} put aside ({len(put_aside)} different)")
    return counts, faults
