from __future__ import annotations

import numpy as np

from manyeyes.runtime.tiling import NEWLINE, TokenLayout, arrange_images


def test_tokens_are_counted_over_the_tiles_of_all_images() -> None:
    layout = TokenLayout(tiling="anyres", tile_size=8, pinpoints=((2, 1),), newline=True, unpad=True)
    places, lengths = arrange_images([(8, 8), (16, 8)], layout, grid=2)
    # Three tiles of 2 x 2 tokens each; the second image's start at 12.
    assert lengths == [10, 14]
    assert places[0].tolist() == [0, 1, 2, 3, 5, 8, NEWLINE, 7, 10, NEWLINE, 0, 0, 0, 0]
    assert places[1].tolist() == [12, 13, 14, 15, 16, 17, 20, 21, NEWLINE, 18, 19, 22, 23, NEWLINE]


def test_no_images_have_no_places() -> None:
    places, lengths = arrange_images([], TokenLayout(newline=True), grid=2)
    assert places.shape == (0, 0)
    assert places.dtype == np.int64
    assert lengths == []
