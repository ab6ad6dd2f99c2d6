"""Facts: what curation knows of each sample without its images, one Parquet file for each shard.

They depend on the shard alone (and on the scripts of writing that a recipe allows), so they are kept by its sha256: a
killed run goes on at the next shard, and a recipe with another cap or ratio starts with what is known.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes.data.contamination.fingerprints import plain_rows
from manyeyes.data.records import (
    PLACEHOLDER,
    Turn,
    as_speaker,
    find_drawing_problem,
    find_id_problem,
    find_placeholder_problem,
    find_role_problem,
)
from manyeyes.data.shards import ShardSource, open_shard, read_shard_metadata
from manyeyes.data.sources_table import (
    DIRECT,
    HTML,
    LETTER,
    NO_ANSWER,
    NUMBER,
    OPTION,
    REASON,
    SHORT,
    UNANSWERABLE,
)
from manyeyes.errors import SnapshotError
from manyeyes.storage import new_file

VERSION = 2
_BATCH = 2000
_COLUMNS = ("id", "source", "sha256", "width", "height", "conversations")
_WORD = re.compile(r"\w+")

# Cambrian-1's and LLaVA's sentences about the format of an answer.
_FORMATS = (SHORT, NUMBER, OPTION, DIRECT, HTML, REASON, LETTER, "respond with `<no answer>`", NO_ANSWER, UNANSWERABLE)
_PROMPTED = tuple(prompt.lower().rstrip(".") for prompt in _FORMATS)

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("problem", pa.string()),  # why it cannot be used; empty when it can
        ("content", pa.uint64()),  # hash of the images' bytes and of the turns as they are
        ("words", pa.uint64()),  # hash of the turns' words, lower case
        ("id_hash", pa.uint64()),
        ("question_chars", pa.int32()),  # of the longest
        ("answer_chars", pa.int32()),  # of all
        ("text_chars", pa.int32()),
        ("pairs", pa.int32()),
        ("one_word", pa.int32()),  # answers of one word to questions without a format prompt
        ("images", pa.int32()),
        ("shortest", pa.int32()),  # side of all images, in pixels; 0 without images
        ("longest", pa.int32()),
        ("aspect", pa.float32()),  # the largest; 1 without images
        ("foreign", pa.float32()),  # share of letters that is of none of the allowed scripts
    ]
)


def read_facts(
    path: Path, *, sha256: str, cache_dir: Path, scripts: Sequence[str] = (), source: ShardSource | None = None
) -> Path:
    """The facts of a shard, made where they are not known.

    Memory: one batch of rows without images.

    Args:
        path: The shard.
        sha256: Of the shard; the cache's key.
        cache_dir: Folder of the cache; made when missing.
        scripts: Of writing that are allowed; all when empty.
        source: Has the shard where it is not on this disk.

    Returns:
        A Parquet file of ``SCHEMA``, one row a sample in the shard's order.

    Raises:
        SnapshotError: The shard is missing, damaged or has other columns.
        StorageError: No space or no permission for the cache.
    """
    kept = facts_path(cache_dir, sha256=sha256, scripts=scripts)
    if kept.is_file():
        return kept
    read_shard_metadata(path, end=None if source is None else source.end(path))
    allowed = frozenset(script.upper() for script in scripts)
    try:
        with open_shard(path, source) as file, new_file(kept) as out, pq.ParquetWriter(out, SCHEMA) as writer:
            for batch in file.iter_batches(batch_size=_BATCH, columns=list(_COLUMNS), use_threads=False):
                facts = [_look_at(row, allowed=allowed) for row in plain_rows(batch)]
                writer.write_table(pa.Table.from_pylist(facts, schema=SCHEMA))
    except (pa.ArrowException, EOFError) as error:
        raise SnapshotError(f"{path} cannot be read ({error})", "a whole Parquet file", "Get it again.") from error
    return kept


def facts_path(cache_dir: Path, *, sha256: str, scripts: Sequence[str]) -> Path:
    """Where the facts of a shard are kept; arguments as for ``read_facts``."""
    of_scripts = hashlib.sha256(",".join(sorted(scripts)).encode()).hexdigest()[:8] if scripts else "any"
    return cache_dir / f"{sha256}-{of_scripts}-v{VERSION}.parquet"


def _look_at(row: Mapping[str, Any], *, allowed: Collection[str]) -> dict[str, Any]:
    turns = _turns(row)
    hashes, widths, heights = (list(row[name] or ()) for name in ("sha256", "width", "height"))
    name = row["id"] or ""
    texts = [turn.text for turn in turns]
    asked, answers = texts[0::2], texts[1::2]
    sizes = [(min(pair), max(pair)) for pair in zip(widths, heights, strict=False) if None not in pair and min(pair)]
    return {
        "id": name,
        "source": row["source"] or "",
        "problem": _find_problem(row, turns, name=name, hashes=hashes, sizes=sizes),
        "content": _hash_parts([*(digest or "" for digest in hashes), *(f"{t.speaker}:{t.text}" for t in turns)]),
        "words": _hash_parts([" ".join(_WORD.findall(" ".join(texts).lower()))]),
        "id_hash": _hash_parts([name]),
        "question_chars": max((len(text.replace(PLACEHOLDER, "").strip()) for text in asked), default=0),
        "answer_chars": sum(map(len, answers)),
        "text_chars": sum(map(len, texts)),
        "pairs": len(answers),
        "one_word": sum(
            len(answer.split(maxsplit=1)) == 1 and not has_format_prompt(question)
            for question, answer in zip(asked, answers, strict=False)
        ),
        "images": len(hashes),
        "shortest": min((short for short, _ in sizes), default=0),
        "longest": max((long for _, long in sizes), default=0),
        "aspect": max((long / short for short, long in sizes), default=1.0),
        "foreign": _share_outside("".join(texts), allowed),
    }


def _turns(row: Mapping[str, Any]) -> list[Turn]:
    said = [turn or {} for turn in row["conversations"] or ()]
    return [Turn(as_speaker(turn.get("from") or ""), turn.get("value") or "") for turn in said]


def _find_problem(
    row: Mapping[str, Any],
    turns: Sequence[Turn],
    *,
    name: str,
    hashes: Sequence[str | None],
    sizes: Sequence[tuple[int, int]],
) -> str:
    if None in (row["id"], row["conversations"]):
        return "it has text that is not UTF-8, or a null; needed: UTF-8"
    if len(sizes) != len(hashes) or None in hashes:
        return f"it has {len(hashes)} images and {len(sizes)} sizes of images; needed: sha256 and size of each"
    problem = (
        find_id_problem(name)
        or find_role_problem(turns)
        or find_placeholder_problem(turns, num_images=len(hashes))
        or find_drawing_problem(turns)
    )
    return "" if problem is None else str(problem)


def has_format_prompt(question: str) -> bool:
    """Whether a question already says in which format it is to be answered."""
    lower = question.lower()
    return any(prompt in lower for prompt in _PROMPTED)


def _hash_parts(parts: Sequence[str]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def _share_outside(text: str, allowed: Collection[str]) -> float:
    """Share of a text's letters that is of none of some scripts; 0 where all are allowed or there is no letter."""
    if not allowed or (text.isascii() and "LATIN" in allowed):
        return 0.0
    letters = [script for letter in text if (script := _script(letter))]
    return sum(script not in allowed for script in letters) / len(letters) if letters else 0.0


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    """The script of a letter as its Unicode name begins; empty for what is no letter."""
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0] if letter.isalpha() else ""
