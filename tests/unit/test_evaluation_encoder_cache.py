"""Visual tokens by image: what is kept comes back bit for bit, within its bounds, and trouble costs time only."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.answering import encoder_cache
from manyeyes.evaluation.answering.answer_cache import CacheWarning
from manyeyes.evaluation.answering.encoder_cache import (
    EncoderCache,
    EncoderCacheSettings,
    ImageCounts,
    encoder_cache_settings,
)
from manyeyes.runtime.vision import ImageTokens

SIZE = 4 * 8 * 4
"""Bytes of an image's tokens, ``[4, 8]`` in float32."""


def make_tokens(seed: int, *, looks: int = 0) -> ImageTokens:
    draw = np.random.default_rng(seed)
    windows = {
        "window_keys": draw.standard_normal((looks, 5, 3)).astype(np.float32),
        "window_mask": draw.random((looks, 5)) < 0.5,
        "window_overall": draw.standard_normal((looks, 3)).astype(np.float32),
    }
    tokens = draw.standard_normal((4, 8)).astype(np.float32)
    return ImageTokens(tokens, np.arange(looks), windows if looks else {})


def make_cache(folder: Path | None = None, *, key: str = "k", memory: int = 1 << 20, disk: int = 1 << 20):
    return EncoderCache(EncoderCacheSettings(key, folder, memory_bytes=memory, disk_bytes=disk))


def assert_same(found: ImageTokens | None, expected: ImageTokens) -> None:
    assert found is not None
    assert (found.tokens.dtype, found.looks.dtype) == (np.float32, expected.looks.dtype)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.looks, expected.looks)
    assert list(found.windows) == list(expected.windows)
    for name, values in expected.windows.items():
        assert found.windows[name].dtype == values.dtype
        np.testing.assert_array_equal(found.windows[name], values)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("looks", [0, 3])
def test_tokens_come_back_from_memory_and_from_disk(tmp_path: Path, looks: int) -> None:
    tokens = make_tokens(1, looks=looks)
    first = make_cache(tmp_path)
    assert first.find(b"image") is None
    first.keep(b"image", tokens, seconds=1)
    assert_same(first.find(b"image"), tokens)
    assert first.counts == ImageCounts(encoded=1, from_memory=1)
    second = make_cache(tmp_path)
    assert_same(second.find(b"image"), tokens)
    assert_same(second.find(b"image"), tokens)
    assert second.find(b"another") is None
    assert second.counts == ImageCounts(from_memory=1, from_disk=1)
    assert second.counts + first.counts - first.counts == second.counts


def test_tokens_that_may_only_be_read_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cache(tmp_path).keep(b"image", make_tokens(1), seconds=1)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    assert_same(make_cache(tmp_path).find(b"image"), make_tokens(1))


def test_another_model_has_other_tokens(tmp_path: Path) -> None:
    make_cache(tmp_path).keep(b"image", make_tokens(1), seconds=1)
    assert make_cache(tmp_path, key="another").find(b"image") is None
    keys = {
        encoder_cache_settings(tmp_path, kind=kind, model_digest=model, code_digest=code).key
        for kind, model, code in (("torch", "m", "c"), ("bundle", "m", "c"), ("torch", "n", "c"), ("torch", "m", "n"))
    }
    assert len(keys) == 4


def test_memory_keeps_what_was_used_last_and_not_the_batch_around_it() -> None:
    cache = make_cache(memory=2 * SIZE)
    batch = np.zeros((1000, 4, 8), np.float32)
    for number in range(2):
        cache.keep(bytes([number]), ImageTokens(batch[number]), seconds=1)
    found = cache.find(b"\x00")
    assert found is not None
    assert found.tokens.base is None, "a view would hold the whole batch in memory"
    cache.keep(b"\x02", make_tokens(2), seconds=1)
    assert [cache.find(bytes([number])) is not None for number in range(3)] == [True, False, True]
    cache.keep(b"large", ImageTokens(np.zeros((100, 8), np.float32)), seconds=1)
    assert cache.find(b"large") is None
    assert cache.find(b"\x02") is not None
    nothing = make_cache(memory=0)
    nothing.keep(b"image", make_tokens(1), seconds=1)
    assert nothing.find(b"image") is None


def test_the_bound_on_disk_holds_for_all_models_and_the_last_used_stay(tmp_path: Path) -> None:
    bound = 8000
    old = make_cache(tmp_path, key="old", disk=bound)
    old.keep(b"of another model", make_tokens(0), seconds=1)
    (path,) = files_in(tmp_path)
    size = path.stat().st_size
    os.utime(path, (1, 1))
    cache = make_cache(tmp_path, memory=0, disk=bound)
    cache.keep(b"first", make_tokens(1), seconds=1)
    for number in range(50):
        then = time.time() - 1000 + number
        for file in files_in(tmp_path):
            if file.stat().st_mtime > then:
                os.utime(file, (then, then))
        assert cache.find(b"first") is not None, "it was used a moment ago"
        cache.keep(bytes([number]), make_tokens(number), seconds=1)
        assert sum(file.stat().st_size for file in files_in(tmp_path)) <= bound
    assert not path.exists()
    assert bound // size - 3 < len(files_in(tmp_path)) <= bound // size
    assert cache.find(bytes([49])) is not None
    assert cache.find(bytes([0])) is None


def test_a_damaged_file_is_made_again_with_one_warning(tmp_path: Path) -> None:
    first = make_cache(tmp_path)
    for number in range(3):
        first.keep(bytes([number]), make_tokens(number), seconds=1)
    contents = [path.read_bytes() for path in files_in(tmp_path)]
    flipped = bytearray(contents[1])
    flipped[len(flipped) // 2] ^= 1
    for path, content in zip(files_in(tmp_path), (contents[0][:-40], bytes(flipped), b""), strict=True):
        path.write_bytes(content)
    second = make_cache(tmp_path)
    with pytest.warns(CacheWarning, match="a file is damaged") as warned:
        assert [second.find(bytes([number])) for number in range(3)] == [None, None, None]
    assert len(warned) == 1
    assert files_in(tmp_path) == []
    second.keep(b"\x01", make_tokens(1), seconds=1)
    assert_same(make_cache(tmp_path).find(b"\x01"), make_tokens(1))


def test_a_folder_that_cannot_be_written_costs_the_files_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    cache = make_cache(tmp_path / "file")
    with pytest.warns(CacheWarning, match="no more is written"):
        cache.keep(b"\x00", make_tokens(0), seconds=1)
    cache.keep(b"\x01", make_tokens(1), seconds=1)
    assert cache.find(b"\x00") is not None
    assert cache.find(b"\x01") is not None


def test_an_almost_full_disk_is_left_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 << 30, 9 << 30, 1 << 30))
    cache = make_cache(tmp_path)
    cache.keep(b"image", make_tokens(1), seconds=1)
    assert files_in(tmp_path) == []
    assert cache.find(b"image") is not None


def test_tokens_that_are_made_faster_than_written_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_cache, "_TRIAL", 4)
    quick, slow = make_cache(tmp_path / "quick"), make_cache(tmp_path / "slow")
    for number in range(10):
        quick.keep(bytes([number]), make_tokens(number), seconds=0)
        slow.keep(bytes([number]), make_tokens(number), seconds=60)
    assert (len(files_in(tmp_path / "quick")), len(files_in(tmp_path / "slow"))) == (4, 10)
    assert quick.find(b"\x09") is not None


def test_the_environment_bounds_both_and_0_switches_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"kind": "torch", "model_digest": "m", "code_digest": "c"}
    monkeypatch.delenv("MANYEYES_ENCODER_CACHE_MEMORY_GB", raising=False)
    monkeypatch.delenv("MANYEYES_ENCODER_CACHE_DISK_GB", raising=False)
    settings = encoder_cache_settings(tmp_path, **facts)
    assert (settings.memory_bytes, settings.disk_bytes) == (2 << 30, 20 << 30)
    monkeypatch.setenv("MANYEYES_ENCODER_CACHE_MEMORY_GB", "0.5")
    monkeypatch.setenv("MANYEYES_ENCODER_CACHE_DISK_GB", "0")
    settings = encoder_cache_settings(tmp_path, **facts)
    assert (settings.memory_bytes, settings.disk_bytes) == (1 << 29, 0)
    EncoderCache(settings).keep(b"image", make_tokens(1), seconds=1)
    assert files_in(tmp_path) == []
    monkeypatch.setenv("MANYEYES_ENCODER_CACHE_DISK_GB", "-3")
    with pytest.raises(EvaluationError, match="MANYEYES_ENCODER_CACHE_DISK_GB is '-3'"):
        encoder_cache_settings(tmp_path, **facts)
