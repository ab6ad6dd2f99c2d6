"""Parts of the search for contamination: hashes, the index, n-grams."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.contamination import CHANGES, FILTERS, encode, photographs, share_by_hash_alone
from manyeyes.data.contamination import fingerprints
from manyeyes.data.contamination.findings import Thresholds
from manyeyes.data.contamination.fingerprints import (
    COMMON,
    HashIndex,
    TextIndex,
    fingerprint_shard,
    hash_differences,
    hash_ngrams,
    make_thumbnail,
    measure_entropy,
)
from manyeyes.data.records import Record, Turn, read_image_file
from manyeyes.data.shards import write_shards
from manyeyes.errors import ShapeError


def record(name: str, *images: bytes, text: str = "what is it?") -> Record:
    turns = (Turn("human", "<image>\n" * len(images) + text), Turn("gpt", "a thing"))
    return Record(name, "toy", tuple(read_image_file(data, path=name) for data in images), turns)


# --- hashes --------------------------------------------------------------------------------------------------------


def test_hash_has_a_bit_for_each_rise_to_the_right() -> None:
    grey = np.zeros((8, 9), np.uint8)
    grey[0, 1] = 5  # row 0 rises once, into column 1, and falls after it
    assert hash_differences(grey) == (1 << 63, 1 << 57)
    rising = np.tile(np.arange(9, dtype=np.uint8), (8, 1))
    assert hash_differences(rising) == (2**64 - 1, 0)


def test_the_mirrored_hash_is_the_hash_of_the_mirrored_picture() -> None:
    image = photographs()["chelsea.png"]
    grey = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    mirrored = grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert hash_differences(np.asarray(grey))[::-1] == hash_differences(np.asarray(mirrored))


def test_entropy_counts_grey_levels() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    assert measure_entropy(picture) == 0
    picture[:32] = 255
    assert measure_entropy(picture) == pytest.approx(1)
    picture[::2, ::2] = 100
    assert measure_entropy(picture) == pytest.approx(-0.25 * np.log2(0.25) - 2 * 0.375 * np.log2(0.375))


def test_photographs_can_be_told_apart_and_drawings_of_one_shape_cannot() -> None:
    least = min(measure_entropy(make_thumbnail(encode(image))) for image in photographs().values())
    assert least > Thresholds().min_entropy
    shape = Image.new("RGB", (64, 64), "white")
    shape.paste((200, 30, 30), (10, 20, 40, 50))
    assert measure_entropy(make_thumbnail(encode(shape))) < Thresholds().min_entropy


# --- the index -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("radius", [0, 3, 4, 7])
def test_the_index_finds_exactly_the_pairs_within_the_radius(radius: int, compact: bool) -> None:
    random = np.random.default_rng(radius)
    hashes = random.integers(0, 2**64, 500, dtype=np.uint64)
    queries = random.integers(0, 2**64, 2000, dtype=np.uint64)
    for place in range(1500):  # all distances from 0 to 9, in bits of every band
        flipped = sum(1 << int(bit) for bit in random.choice(64, place % 10, replace=False))
        queries[place] = int(hashes[place % 500]) ^ flipped
    index = HashIndex(hashes, radius=radius, compact=compact)
    asked, members, distances = index.search(queries)
    all_distances = np.bitwise_count(queries[:, None] ^ hashes[None])
    expected = np.nonzero(all_distances <= radius)
    assert len(asked) >= 150 * (radius + 1)
    np.testing.assert_array_equal((asked, members), expected)
    np.testing.assert_array_equal(distances, all_distances[expected])
    found = index.search(queries, wanted=lambda asked, _: asked % 3 == 0)
    np.testing.assert_array_equal(found[0], asked[asked % 3 == 0])


def test_many_equal_hashes_are_all_found() -> None:
    hashes = np.full(3000, 42, np.uint64)
    asked, members, _ = HashIndex(hashes, radius=7).search(np.full(500, 43, np.uint64))
    assert (len(asked), len(set(members))) == (1_500_000, 3000)


def test_empty_sides_give_no_pairs() -> None:
    nothing = np.zeros(0, np.uint64)
    assert len(HashIndex(nothing, radius=7).search(np.arange(5, dtype=np.uint64))[0]) == 0
    assert len(HashIndex(np.arange(5, dtype=np.uint64), radius=7).search(nothing)[0]) == 0


def test_a_radius_that_bands_cannot_promise_is_refused() -> None:
    with pytest.raises(ShapeError, match="radius is 8"):
        HashIndex(np.zeros(1, np.uint64), radius=8)


# --- recall and false positives -----------------------------------------------------------------------------------

# Least share of 87 photographs that is found; a little below what `python -m bench.contamination` measures.
RECALL = {
    "JPEG, quality 90": 1.0,
    "JPEG, quality 50": 0.97,
    "JPEG, quality 20": 0.93,
    "half the size": 1.0,
    "224x224, whatever the aspect": 1.0,
    "cropped by 2%": 0.9,
    "mirrored, JPEG 50": 0.97,
}


def test_changed_photographs_are_found_and_different_ones_are_not() -> None:
    limits = Thresholds()

    def look(data: bytes) -> tuple[int, int, np.ndarray]:
        grey = Image.open(io.BytesIO(data)).convert("L").resize((9, 8), Image.Resampling.BOX)
        return *hash_differences(np.asarray(grey)), make_thumbnail(data).astype(int)

    # Smaller, for speed; re-encoding acts on them as on the whole ones.
    images = [image.resize((image.width // 2, image.height // 2)) for image in photographs().values()]
    originals = [look(encode(image)) for image in images]
    for change, least in RECALL.items():
        found = 0
        for image, (original, _, pixels) in zip(images, originals, strict=True):
            plain, mirrored, changed = look(CHANGES[change](image))
            if change.startswith("mirrored"):
                plain, changed = mirrored, changed[:, ::-1]
            near = (plain ^ original).bit_count() <= limits.radius
            found += near and np.abs(changed - pixels).mean() <= limits.max_difference
        assert found / len(images) >= least, change
    hashes = np.array([original for original, _, _ in originals], np.uint64)
    asked, members, _ = HashIndex(hashes, radius=limits.radius).search(hashes)
    different = asked != members
    assert different.any()  # dHash alone does call different photographs the same
    for one, other in zip(asked[different], members[different], strict=True):
        assert np.abs(originals[one][2] - originals[other][2]).mean() > limits.max_difference


def test_how_a_picture_is_made_small_decides_what_a_hash_alone_calls_known() -> None:
    shares = {name: share_by_hash_alone(filter_) for name, filter_ in FILTERS.items()}
    # docs/contamination.md states them; another release of Pillow may round a few pictures otherwise.
    stated = {"mean": (1.0, 1.0), "Lanczos": (0.767, 0.881), "bicubic": (0.943, 0.984), "bilinear": (1.0, 1.0)}
    for (name, found), expected in zip(shares.items(), stated.values(), strict=True):
        assert found == pytest.approx(expected, abs=0.01), name


# --- shards --------------------------------------------------------------------------------------------------------


def test_fingerprints_are_kept_by_the_shards_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = encode(photographs()["coffee.png"].resize((60, 40)))
    cut = read_image_file(good, path="cut").data[:-200]
    (shard,) = write_shards([record("a", good, good), record("b"), record("c", cut)], tmp_path, "train")
    first = fingerprint_shard(shard, sha256="1" * 64, cache_dir=tmp_path / "cache")
    assert first[["row", "image"]].tolist() == [(0, 0), (0, 1), (2, 0)]
    assert first["entropy"][0] > 3
    assert first["entropy"][2] == -1  # cannot be decoded
    monkeypatch.setattr(fingerprints, "read_samples", None)
    again = fingerprint_shard(shard, sha256="1" * 64, cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(again, first)
    with pytest.raises(TypeError):
        fingerprint_shard(shard, sha256="2" * 64, cache_dir=tmp_path / "cache")


# --- texts ---------------------------------------------------------------------------------------------------------

LONG = "the quick brown fox jumps over the lazy dog while seven wizards quietly drink tea by the river"


def test_ngrams_do_not_cross_texts_and_ignore_case_and_punctuation() -> None:
    hashes, owners = hash_ngrams(["a b c d", "x", "A, b; C!"], n=3)
    assert owners.tolist() == [0, 0, 2]
    assert hashes[0] == hashes[2] != hashes[1]
    assert len(hash_ngrams(["a b"], n=3)[0]) == 0
    one, other = hash_ngrams(["a b c", "c b a"], n=3)[0]
    assert one != other


def test_a_text_overlaps_from_the_share_on() -> None:
    index = TextIndex([LONG, "short one"], n=5, share=0.5)
    assert index.too_short.tolist() == [False, True]
    words = LONG.split()  # 18 words: 14 n-grams of 5
    asked, members, shares = index.search(["nothing", " ".join(words[:11]), " ".join(words[:10]), LONG.upper()])
    assert (asked.tolist(), members.tolist()) == ([1, 3], [0, 0])
    assert shares.tolist() == [0.5, 1.0]  # 11 words hold 7 of the 14, 10 hold 6


def test_phrases_of_the_benchmark_do_not_count() -> None:
    phrase = "answer with the letter of the right choice alone please"
    texts = [f"{phrase} {number}" for number in range(COMMON + 1)]
    index = TextIndex(texts, n=5, share=0.1)
    asked, members, shares = index.search([f"{phrase} 3", phrase])
    # What is left of each text is the n-gram with its own number at the end.
    assert (asked.tolist(), members.tolist(), shares.tolist()) == ([0], [3], [1.0])


def test_a_repeated_ngram_counts_once() -> None:
    index = TextIndex(["a b a b a b c d"], n=2, share=1.0)  # ab, ba, bc, cd
    assert index.search(["a b a", "a b a x b c d"])[2].tolist() == [1.0]


def test_no_texts_at_all() -> None:
    index = TextIndex([], n=3, share=0.5)
    assert len(index.search([LONG])[0]) == 0
    assert len(TextIndex([LONG], n=3, share=0.5).search([])[0]) == 0
