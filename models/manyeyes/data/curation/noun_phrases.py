"""LLaVA's filter of captions by noun phrases: rare things are all kept, frequent ones thinned out.

LLaVA took spaCy for the phrases. Its English model is no package of an index, and neither is the data that nltk's
taggers need; both are downloads at run time, which a step in a cluster without a way out cannot make. TextBlob carries
its lexicon, its rules and its chunker in its own package (2.6 MB, MIT, the tagger of pattern.en), reads thousands of
captions a second on one core, and is maintained. Phrases differ in part from spaCy's, so counts do, too; the filter is
the same.

Source: LLaVA, arXiv:2304.08485, appendix E: 3.3M captions of CC3M become 595K.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyeyes.data.contamination.fingerprints import plain_rows
from manyeyes.data.shards import ShardSource, open_shard
from manyeyes.storage import new_file

VERSION = 1
_BATCH = 2000
_LEADING = ("DT", "PDT", "PRP$", "WP$", "WDT", "CD")
PAIR = np.dtype([("row", "<u4"), ("phrase", "<u8")])


def find_noun_phrases(caption: str) -> list[str]:
    """The noun phrases of a caption, each once, in order.

    Args:
        caption: English; case does not matter.

    Returns:
        Lower case, without articles, possessives and numbers in front: "two dogs" and "the dogs" are "dogs".
    """
    found: dict[str, None] = {}
    for sentence in _load_parser()(caption.lower()).split():
        for chunk in _chunks(sentence):
            while chunk and chunk[0][1] in _LEADING:
                chunk = chunk[1:]
            if any(tag.startswith("NN") for _, tag in chunk):
                found[" ".join(word for word, _ in chunk)] = None
    return list(found)


@cache
def _load_parser() -> Callable[[str], Any]:
    from textblob.en import parse  # takes 3 s to import, for nltk's sake

    with warnings.catch_warnings():
        # It leaves the files of its lexicon to the garbage collector (textblob/_text.py, _read).
        warnings.simplefilter("ignore", ResourceWarning)
        parse("an axolotlish thing named Smith runs unseenly.")
    parser: Callable[[str], Any] = parse
    return parser


def _chunks(sentence: Sequence[Sequence[str]]) -> Iterator[list[tuple[str, str]]]:
    chunk: list[tuple[str, str]] = []
    for word, tag, part, *_ in sentence:
        if part != "I-NP" and chunk:
            yield chunk
            chunk = []
        if part in ("B-NP", "I-NP"):
            chunk.append((word, tag))
    if chunk:
        yield chunk


def read_phrases(
    path: Path,
    *,
    sha256: str,
    cache_dir: Path,
    is_caption: Callable[[str], bool],
    of: Sequence[str],
    source: ShardSource | None = None,
) -> NDArray[np.void]:
    """The phrases of a shard's captions, from the cache where they are known.

    Args:
        path: The shard.
        sha256: Of the shard; with ``of`` the cache's key.
        cache_dir: Folder of the cache; made when missing.
        is_caption: Whether the records of a source are captions.
        of: What ``is_caption`` goes by.
        source: Has the shard where it is not on this disk.

    Returns:
        A ``PAIR`` for each phrase of each caption: row of the shard and hash of the phrase.
    """
    kept = phrases_path(cache_dir, sha256=sha256, of=of)
    if kept.is_file():
        known: NDArray[np.void] = np.load(kept)
        return known
    pairs: list[tuple[int, int]] = []
    first = 0
    with open_shard(path, source) as file:
        for batch in file.iter_batches(batch_size=_BATCH, columns=["source", "conversations"], use_threads=False):
            for row, values in enumerate(plain_rows(batch), start=first):
                if is_caption(values["source"] or ""):
                    pairs += [(row, _hash(phrase)) for phrase in find_noun_phrases(_caption(values))]
            first += batch.num_rows
    found = np.array(pairs, PAIR)
    with new_file(kept) as out, out.open("wb") as stream:
        np.save(stream, found)
    return found


def phrases_path(cache_dir: Path, *, sha256: str, of: Sequence[str]) -> Path:
    """Where the phrases of a shard's captions are kept; arguments as for ``read_phrases``."""
    key = hashlib.sha256("\n".join(of).encode()).hexdigest()[:8]
    return cache_dir / f"{sha256}-phrases-{key}-v{VERSION}.npy"


def _caption(values: dict[str, Any]) -> str:
    turns = [turn or {} for turn in values["conversations"] or ()]
    return ". ".join(turn["value"] or "" for turn in turns if turn.get("from") == "gpt")


def _hash(phrase: str) -> int:
    return int.from_bytes(hashlib.blake2b(phrase.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def thin_out(
    samples: NDArray[np.int64],
    phrases: NDArray[np.uint64],
    *,
    rank: NDArray[np.int64],
    min_count: int,
    max_count: int,
) -> tuple[NDArray[np.int64], int, int]:
    """The samples that some phrase asks for.

    Args:
        samples: Of each pair of a sample and a phrase, the sample.
        phrases: Of each pair, the phrase.
        rank: Of every sample, its place in the order in which samples are drawn.
        min_count: Phrases of fewer samples ask for none.
        max_count: Samples that a phrase asks for at most: those that are drawn first.

    Returns:
        The samples, each once; how many phrases there are, and how many are frequent enough.
    """
    order = np.lexsort((rank[samples], phrases))
    samples, phrases = samples[order], phrases[order]
    unique, first, counts = np.unique(phrases, return_index=True, return_counts=True)
    place = np.arange(len(phrases)) - np.repeat(first, counts)
    asked = (np.repeat(counts, counts) >= min_count) & (place < max_count)
    return np.unique(samples[asked]), len(unique), int((counts >= min_count).sum())
