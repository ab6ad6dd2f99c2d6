"""Odd records from a fixed seed, through validation, contamination, mixture and batches: ``bench.fuzz`` runs them.

What validation keeps for a recipe, every batch of every stage must take; what it puts aside because a stage refuses it,
that stage must refuse; and each row has one of the two outcomes.
"""

from __future__ import annotations

import hashlib
import io
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.contamination.search import find_contamination
from manyeyes.data.mixture import Mixture
from manyeyes.data.profile import build_profile
from manyeyes.data.quarantine import row_name
from manyeyes.data.shards import SCHEMA
from manyeyes.data.snapshot import Snapshot, open_folder, open_snapshot, read_default_remote, read_dvc_file
from manyeyes.errors import RecordError
from manyeyes.model import build_model
from manyeyes.recipe import Recipe, StageSpec
from manyeyes.training.batches import Admission, BatchBuilder, processor_of_stage, stage_seed

SEED = 20240518
DATASET = "odd-train"
_ROWS_A_ROUND = 250
_SIZES = ((32, 32), (48, 20), (2, 200), (200, 2), (1, 1), (1, 63), (64, 8), (7, 31))
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_TEXTS = (
    *_LINE_ENDS, "", " ", "\0", "\ufeff", "\ufffd", "a\u0301\u0301", "\u202eabc",
    "\U0001f469\u200d\U0001f680", "\ufdfa" * 9,
    "<image>", "<image> <image>", "<img", "</s>", "<s>", "<pad>", "USER: x ASSISTANT:", "<GEN>", "<h>a</h>", "<h>a",
    "null", "word " * 12, "word " * 40, "x" * 300, "\u4e2d\u6587" * 20, "tab\tand  spaces  ", " lead", "long " * 4000,
)  # fmt: skip
_HALF_A_PAIR = b"Yes \xed\xa0\xbd"  # U+D83D alone, as a careless writer leaves it


def _image(draw: random.Random) -> tuple[bytes, int, int]:
    width, height = draw.choice(_SIZES)
    pixels = np.random.default_rng(draw.randrange(40)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    if draw.random() < 0.2:
        exif[0x0112] = 6  # shown on its side
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, draw.choice(("PNG", "JPEG", "WEBP")), exif=exif)
    return buffer.getvalue(), width, height


def _whole_row(number: int, draw: random.Random) -> dict[str, Any]:
    images = [_image(draw) for _ in range(draw.choice((0, 1, 1, 1, 2)))]
    pairs = draw.choice((1, 1, 2, 3))
    said = [draw.choice(("what is it?", "a dog", "yes", "is it red or blue?", "two")) for _ in range(2 * pairs)]
    said[0] = "<image>\n" * len(images) + said[0]
    return {
        "id": f"odd/{number}",
        "source": "odd",
        "images": [{"bytes": data, "path": f"{number}.png"} for data, _, _ in images],
        "sha256": [hashlib.sha256(data).hexdigest() for data, _, _ in images],
        "width": [width for _, width, _ in images],
        "height": [height for _, _, height in images],
        "conversations": [{"from": "gpt" if place % 2 else "human", "value": text} for place, text in enumerate(said)],
    }


def _spoil(row: dict[str, Any], draw: random.Random) -> None:
    """Change one thing, which need not make the row a bad one."""
    turns = row["conversations"]
    turn = draw.choice(turns) if turns else None
    kind = draw.randrange(12)
    if kind == 0:
        row[draw.choice(list(row))] = None
    elif kind == 1:
        row["id"] = draw.choice(
            (None, "", " ", "twin", f"{DATASET}#3", "a" * 5000, *_LINE_ENDS, "\U0001f680", "a/../b")
        )
    elif kind == 2 and turn:
        turn["from"] = draw.choice((None, "", "human", "gpt", "system", "user", f"hu{draw.choice(_LINE_ENDS)}man"))
    elif kind in (3, 4, 5) and turn:
        text = turn["value"] if isinstance(turn["value"], str) else ""
        turn["value"] = draw.choice(("", text)) + draw.choice(_TEXTS)
    elif kind == 6 and turn:
        turn["value"] = draw.choice((None, _HALF_A_PAIR))
    elif kind == 7 and turns:
        place = draw.randrange(len(turns))
        turns[place : place + draw.randrange(2)] = draw.choice(([], [None], [dict(turns[place] or {})]))
    elif kind == 8:
        name = draw.choice(("images", "sha256", "width", "height"))
        row[name] = draw.choice((None, [], [None], (row[name] or [])[:-1], 2 * (row[name] or [])))
    elif kind == 9 and row["images"] and row["images"][0]:
        data = row["images"][0]["bytes"] or b""
        row["images"][0]["bytes"] = draw.choice((None, b"", data[: len(data) // 2], data[:9] + b"\xff" + data[10:]))
    elif kind == 10 and row["width"]:
        row["width"] = [draw.choice((0, -1, 2**31 - 1, 5)) for _ in row["width"]]
    elif kind == 11:
        row["source"] = draw.choice((None, "", _HALF_A_PAIR, draw.choice(_TEXTS)))


def odd_rows(number: int, draw: random.Random) -> list[dict[str, Any]]:
    """Rows of records, about two in three with one to three things changed."""
    rows = []
    for place in range(number):
        row = _whole_row(place, draw)
        for _ in range(draw.choice((0, 1, 1, 2, 3, 0))):
            _spoil(row, draw)
        rows.append(row)
    return rows


def write_odd_snapshot(
    folder: Path, rows: list[dict[str, Any]], *, language_model: Path, rows_a_group: int = 40
) -> Snapshot:
    """A snapshot of rows in two shards, whatever they hold: text that is not UTF-8 too."""
    raw = {"id": _RAW, "source": _RAW, "images": pa.list_(pa.struct([("bytes", pa.binary()), ("path", _RAW)]))}
    raw |= {"conversations": pa.list_(pa.struct([("from", _RAW), ("value", _RAW)])), "sha256": pa.list_(_RAW)}
    schema = pa.schema([(field.name, raw.get(field.name, field.type)) for field in SCHEMA])
    (folder / "odd").mkdir(parents=True)
    half = len(rows) // 2
    for shard, part in enumerate((rows[:half], rows[half:])):
        table = pa.Table.from_pylist([_encode(row) for row in part], schema=schema)
        columns = [
            pc.cast(table.column(field.name), options=pc.CastOptions(field.type, allow_invalid_utf8=True))
            for field in SCHEMA
        ]
        pq.write_table(
            pa.table(columns, schema=SCHEMA), folder / "odd" / f"train-{shard:05d}.parquet", row_group_size=rows_a_group
        )
    shutil.copytree(language_model, folder / "pretrained" / "lm")
    made = Provenance("CC0-1.0", "made by bench.fuzz")
    write_snapshot_manifest(folder, provenance={DATASET: made, "lm": made})
    return open_folder(folder)


_RAW = pa.binary()


def _encode(value: Any) -> Any:
    """Texts as bytes, all the way down."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list):
        return [_encode(entry) for entry in value]
    return {key: _encode(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def odd_recipes() -> dict[str, Recipe]:
    """Recipes that between them show records in every way that a mixture knows, with every layout of tokens."""
    models: dict[str, dict[str, Any]] = {
        "plain": {},
        "unpad": {"layout": {"unpad": True, "newline": True}},
        "anyres": {"layout": {"tiling": "anyres", "newline": True, "unpad": True}},
        "captions": {},
    }
    mixtures: dict[str, list[dict[str, Any]]] = {
        "plain": [{"turns": "independent", "image_dropout": 0.4}, {"turns": "independent"}],
        "unpad": [{"turns": "chained"}, {"turns": "chained", "image_dropout": 1.0}],
        "anyres": [{"turns": "chained", "order": "recorded"}, {"turns": "independent"}],
        "captions": [{"questions": "brief"}, {"turns": "independent", "questions": "brief", "image_dropout": 0.1}],
    }
    stages: dict[str, dict[str, dict[str, Any]]] = {
        "plain": {"pretrain": {}, "sft": {"epochs": 3}},
        "unpad": {"prealign": {"epochs": 2}, "sft": {"epochs": 3, "model": {"language_model.max_length": 90}}},
        "anyres": {"pretrain": {"too_long": "cut", "epochs": 2}, "sft": {"fit": "stretch"}},
        "captions": {"prealign": {"encoders": ["left"], "train": {"encoders": 1e-3}}, "sft": {"template": "plain"}},
    }
    recipes = {}
    for name, changes in models.items():
        mixture = [{"dataset": DATASET, **part} for part in mixtures[name]]
        rates = {"projector": 1e-3}
        recipes[name] = Recipe.model_validate(
            {
                "name": name,
                "model": {
                    "encoders": [
                        {"name": "left", "encoder": "vit-tiny-p16-64", "image_size": 32},
                        {"name": "right", "encoder": "vit-tiny-p16-64", "image_size": 32},
                    ],
                    "fusion": {"grid": 2},
                    "language_model": {"source": "snapshot:pretrained/lm", "max_length": 128},
                    "chat": {"system": ""},
                    **changes,
                },
                "stages": {
                    stage: {"train": rates, "batch_size": 8, "mixture": mixture, **more}
                    for stage, more in stages[name].items()
                },
                "evaluation": {"benchmarks": ["easy-vqa"]},
                "gate": [{"rule": "validation"}],
                "registry": {"model": "odd"},
            }
        )
    return recipes


def check_recipe(recipe: Recipe, snapshot: Snapshot) -> tuple[Counter[str], list[str]]:
    """Validate a snapshot for a recipe, and hold every stage's batches to it.

    Returns:
        How many rows came to what, and a line for each that came to something else than validation said.
    """
    admission = Admission(recipe, snapshot_path=snapshot.path)
    profile = build_profile(snapshot, [DATASET], eval_datasets=[], find_misfit=admission.find_problem)
    bad = profile[profile["problem"] != ""]
    quarantine = {row_name(DATASET, row) for row in bad["row"]}
    refused = bad[bad["problem"].str.startswith("stage ")]
    counts: Counter[str] = Counter({"kept": len(profile) - len(bad), "refused by a stage": len(refused)})
    counts["bad in themselves"] = len(bad) - len(refused)
    faults = []
    if sorted(profile["row"]) != list(range(snapshot.dataset(DATASET).rows)):
        faults.append(f"{recipe.name}: rows without an outcome, or with two")
    for stage, spec in recipe.present_stages():
        for name in recipe.prealigned_encoders() if stage == "prealign" else (None,):
            _, processor = build_model(
                recipe.stage_model(stage),
                snapshot_path=snapshot.path,
                seed=0,
                encoders=None if name is None else [name],
            )
            processor = processor_of_stage(processor, spec)
            seed = stage_seed(recipe, stage, name)
            mixture = Mixture(spec.mixture, snapshot, seed=seed, quarantine=frozenset(quarantine))
            if len(mixture) != counts["kept"] * len(spec.mixture):
                faults.append(f"{recipe.name}, {stage}: {len(mixture)} samples of {counts['kept']} rows kept")
            builder = BatchBuilder(mixture, processor, too_long=spec.too_long)
            for first in range(0, spec.epochs * len(mixture), 8):
                positions = range(first, min(first + 8, spec.epochs * len(mixture)))
                try:
                    builder.build(positions)
                    counts["batches"] += 1
                except Exception as error:  # noqa: BLE001  (the subject of the search)
                    faults.append(f"{recipe.name}, {stage}: {type(error).__name__}: {error}")
            label = f"stage {stage if name is None else f'{stage}[{name}]'} "
            for row in refused[refused["problem"].str.startswith(label)]["row"]:
                others = frozenset(row_name(DATASET, other) for other in profile["row"] if other != row)
                alone = Mixture(spec.mixture, snapshot, seed=seed, quarantine=others)
                if not _is_refused(BatchBuilder(alone, processor, too_long=spec.too_long), len(alone), spec):
                    faults.append(f"{recipe.name}: row {row} is put aside, and {stage} takes it")
    return counts, faults


def _is_refused(builder: BatchBuilder, length: int, spec: StageSpec) -> bool:
    try:
        for position in range(spec.epochs * length):
            builder.build([position])
    except RecordError:
        return True
    return False


def fuzz_records(
    number: int, *, language_model: Path | None = None, seed: int = SEED
) -> tuple[Counter[str], list[str]]:
    """Odd rows through everything that reads them.

    Args:
        number: How many.
        language_model: Folder; that of the checkout's snapshot when left out.
        seed: The same seed gives the same rows.

    Returns:
        How many rows came to what by recipe, and a line for each fault.
    """
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if language_model is None:
            data = read_dvc_file(Path("data.dvc"))
            whole = open_snapshot(md5=data.md5, remote=read_default_remote(Path()), cache_dir=folder / "cache")
            language_model = whole.path / "pretrained" / "tiny-lm"
        for start in range(0, number, _ROWS_A_ROUND):
            rows = odd_rows(min(_ROWS_A_ROUND, number - start), draw)
            snapshot = write_odd_snapshot(folder / str(start), rows, language_model=language_model)
            for recipe in odd_recipes().values():
                found, lines = check_recipe(recipe, snapshot)
                counts.update({f"{recipe.name}: {what}": count for what, count in found.items()})
                faults += [f"round {start}: {line}" for line in lines]
            report = find_contamination(
                snapshot,
                datasets=[DATASET],
                benchmarks=[str(snapshot.shards(DATASET)[0])],
                out_dir=folder / f"{start}-found",
                cache_dir=folder / "prints",
            )
            counts["rows found in a benchmark made of them"] += report.datasets[0].samples
    return counts, faults
