from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_samples import make_record, make_snapshot

from manyeyes.data import mixture as mixture_module
from manyeyes.data.mixture import Mixture, Sample
from manyeyes.data.quarantine import row_name
from manyeyes.data.records import Turn
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import DataError, RecordError, SnapshotError
from manyeyes.recipe import MixturePart

CHAINED = MixturePart(dataset="toy-train", turns="chained")


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    train = [make_record(number, pairs=4) for number in range(350)]
    other = [make_record(number, pairs=1, num_images=0, prefix="other") for number in range(60)]
    return make_snapshot(tmp_path_factory.mktemp("mixture"), {"train": train, "other": other}, rows_per_shard=120)


def ids(mixture: Mixture, epoch: int) -> list[str]:
    return [mixture.sample(epoch, index).record.id for index in range(len(mixture))]


def test_an_epoch_shows_every_sample_once(snapshot: Snapshot) -> None:
    mixture = Mixture([CHAINED, MixturePart(dataset="toy-other")], snapshot, seed=1)
    assert len(mixture) == 410
    expected = {f"toy/{number}" for number in range(350)} | {f"other/{number}" for number in range(60)}
    for epoch in (0, 1):
        assert Counter(ids(mixture, epoch)) == Counter(expected)


def test_epochs_and_seeds_differ_in_order(snapshot: Snapshot) -> None:
    first = Mixture([CHAINED], snapshot, seed=1)
    assert ids(first, 0) != ids(first, 1)
    assert ids(first, 0) != ids(Mixture([CHAINED], snapshot, seed=2), 0)


def test_a_large_data_set_is_shuffled_in_windows(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_module, "WINDOW_GROUPS", 1)
    mixture = Mixture([CHAINED], snapshot, seed=1)
    numbers = [int(name.removeprefix("toy/")) for name in ids(mixture, 0)]
    # Shards of 120 rows hold row groups of 100 and 20; each stays together, in another order, shuffled inside.
    starts = [0, 100, 120, 220, 240, 340]
    group_of = [max(start for start in starts if start <= number) for number in numbers]
    visited = list(dict.fromkeys(group_of))
    assert sorted(visited) == starts
    assert visited != starts
    assert group_of == sorted(group_of, key=visited.index)
    first_of_largest = [number for number in numbers if number < 100]
    assert first_of_largest != sorted(first_of_largest)
    assert sorted(numbers) == list(range(350))


def test_keys_are_those_of_splitmix64() -> None:
    digest = hashlib.sha256(b'[17, "samples"]').digest()
    offset, salt = (int.from_bytes(digest[start : start + 8], "little") for start in (0, 8))
    mask = 2**64 - 1

    def splitmix64(value: int) -> int:
        mixed = ((value + 1) * 0x9E3779B97F4A7C15 + offset) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        return mixed ^ (mixed >> 31) ^ salt

    values = [0, 1, 2, 1000, 2**40]
    keys = mixture_module._keys(np.asarray(values), 17, "samples")
    assert [int(key) for key in keys] == [splitmix64(value) for value in values]


def test_the_order_stays_as_it_was_in_earlier_versions(snapshot: Snapshot) -> None:
    # A changed order would make a resumed run another run: then the algorithm's name must change too.
    first = [int(name.removeprefix("toy/")) for name in ids(Mixture([CHAINED], snapshot, seed=17), 0)[:6]]
    assert first == [348, 43, 332, 111, 84, 115]


def test_quarantined_samples_are_left_out(snapshot: Snapshot) -> None:
    mixture = Mixture(
        [CHAINED], snapshot, seed=1, quarantine=frozenset({"toy-train#3", "toy-train#200", "toy-other#7"})
    )
    assert len(mixture) == 348
    assert not {"toy/3", "toy/200"} & set(ids(mixture, 0))


def test_max_samples_draws_the_same_ones_each_epoch(snapshot: Snapshot) -> None:
    mixture = Mixture([MixturePart(dataset="toy-train", max_samples=50)], snapshot, seed=1)
    assert len(mixture) == 50
    chosen = set(ids(mixture, 0))
    assert chosen == set(ids(mixture, 1))
    assert chosen != {f"toy/{number}" for number in range(50)}


def test_images_are_dropped_in_the_asked_share_and_redrawn_each_epoch(snapshot: Snapshot) -> None:
    mixture = Mixture([MixturePart(dataset="toy-train", image_dropout=0.2)], snapshot, seed=1)

    def dropped(epoch: int) -> set[str]:
        samples = (mixture.sample(epoch, index) for index in range(len(mixture)))
        return {sample.record.id for sample in samples if sample.image_dropped}

    # 350 draws of 0.2: 70 expected, standard deviation 7.5
    assert 45 < len(dropped(0)) < 95
    assert dropped(0) != dropped(1)


def test_chained_pairs_are_shuffled_each_epoch(snapshot: Snapshot) -> None:
    mixture = Mixture([CHAINED], snapshot, seed=1)
    orders = Counter(mixture.sample(0, index).order for index in range(len(mixture)))
    assert len(orders) == 24
    assert max(orders.values()) < 40  # 350 / 24 = 15 expected, standard deviation 3.7


def test_independent_pairs_keep_their_order(snapshot: Snapshot) -> None:
    mixture = Mixture([MixturePart(dataset="toy-train", turns="independent")], snapshot, seed=1)
    assert {mixture.sample(0, index).order for index in range(20)} == {(0, 1, 2, 3)}


def as_sample(
    *texts: str, turns: str = "chained", order: tuple[int, ...] | None = None, dropped: bool = False
) -> Sample:
    pairs = len(texts) // 2
    record = dataclasses.replace(
        make_record(num_images=sum(text.count("<image>") for text in texts)),
        turns=tuple(Turn("gpt" if index % 2 else "human", text) for index, text in enumerate(texts)),
    )
    return Sample("toy-train", record, turns, dropped, order or tuple(range(pairs)))  # type: ignore[arg-type]


def texts_of(sample: Sample) -> list[list[str]]:
    return [[turn.text for turn in conversation] for conversation in sample.conversations()]


def test_independent_questions_each_get_the_images() -> None:
    sample = as_sample("<image>\n<image>\na?", "1", "b?", "2", turns="independent")
    assert texts_of(sample) == [["<image>\n<image>\na?", "1"], ["<image>\n<image>\nb?", "2"]]


def test_chained_questions_move_the_images_to_the_new_first_one() -> None:
    assert texts_of(as_sample("<image>\na?", "1", "b?", "2", order=(1, 0))) == [["<image>\nb?", "2", "a?", "1"]]


def test_a_dropped_image_leaves_no_placeholder() -> None:
    sample = as_sample("<image>\na?", "1", "b?", "2", turns="independent", dropped=True)
    assert texts_of(sample) == [["a?", "1"], ["b?", "2"]]


def test_images_between_words_stay_where_they_are() -> None:
    assert texts_of(as_sample("is <image> like <image>?", "no")) == [["is <image> like <image>?", "no"]]
    assert texts_of(as_sample("<image>\na?", "1", "and <image>?", "2")) == [["<image>\na?", "1", "and <image>?", "2"]]


def test_questions_with_images_of_their_own_cannot_be_independent() -> None:
    with pytest.raises(RecordError, match="Use turns: chained"):
        as_sample("<image>\na?", "1", "and <image>?", "2", turns="independent").conversations()


def test_questions_with_images_of_their_own_are_not_shuffled(tmp_path: Path) -> None:
    record = dataclasses.replace(
        make_record(num_images=2),
        turns=tuple(as_sample("<image>\na?", "1", "and <image>?", "2").record.turns),
    )
    records = [dataclasses.replace(record, id=f"toy/{number}") for number in range(30)]
    mixture = Mixture([CHAINED], make_snapshot(tmp_path, {"train": records}), seed=1)
    assert {mixture.sample(0, index).order for index in range(30)} == {(0, 1)}


def test_the_digest_follows_everything_that_matters(snapshot: Snapshot) -> None:
    digests = [
        Mixture([CHAINED], snapshot, seed=1).digest,
        Mixture([CHAINED], snapshot, seed=2).digest,
        Mixture([CHAINED, CHAINED], snapshot, seed=1).digest,
        Mixture([MixturePart(dataset="toy-train", image_dropout=0.1)], snapshot, seed=1).digest,
        Mixture([MixturePart(dataset="toy-other")], snapshot, seed=1).digest,
        Mixture([CHAINED], snapshot, seed=1, quarantine=frozenset({"toy-train#1"})).digest,
    ]
    assert len(set(digests)) == len(digests)
    assert Mixture([CHAINED], snapshot, seed=1).digest == digests[0]


def test_an_empty_mixture_is_refused(snapshot: Snapshot) -> None:
    everything = frozenset(f"toy-train#{number}" for number in range(350))
    with pytest.raises(DataError, match="350 are in quarantine"):
        Mixture([CHAINED], snapshot, seed=1, quarantine=everything)


def test_an_unknown_data_set_is_refused(snapshot: Snapshot) -> None:
    with pytest.raises(SnapshotError, match='Did you mean "toy-train"'):
        Mixture([MixturePart(dataset="toy-trian")], snapshot, seed=1)


def test_a_position_outside_is_refused(snapshot: Snapshot) -> None:
    with pytest.raises(IndexError):
        Mixture([CHAINED], snapshot, seed=1).sample(0, 350)


def test_all_data_sets_of_a_mixture_share_the_memory_for_one_window(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manyeyes.data.mixture.WINDOW_GROUPS", 2)
    mixture = Mixture([CHAINED, CHAINED, CHAINED], snapshot, seed=0)
    held = [reader._cache for reader in mixture._readers]
    for index in range(len(mixture)):
        mixture.sample(0, index)
        assert len(held[0]) <= 2
    assert all(cache is held[0] for cache in held)


@pytest.mark.parametrize("max_samples", [None, 40])
def test_a_quarantine_leaves_out_its_rows_wherever_they_stand(snapshot: Snapshot, max_samples: int | None) -> None:
    part = CHAINED.model_copy(update={"max_samples": max_samples})
    whole = Mixture([CHAINED], snapshot, seed=4)
    count = len(whole)
    bad = {0, 1, count // 2, count - 1}
    names = frozenset(row_name(CHAINED.dataset, row) for row in bad) | {
        row_name(CHAINED.dataset, count + 5),
        row_name("x", 3),
    }
    mixture = Mixture([part], snapshot, seed=4, quarantine=names)
    rows = sorted(mixture._locate(2, index)[1] for index in range(len(mixture)))
    assert len(rows) == len(set(rows)) == (max_samples or count - len(bad))
    assert set(rows) <= set(range(count)) - bad
