"""Grids of tiles as transformers' GotOcr2ImageProcessor chooses them."""

from __future__ import annotations

import numpy as np
import pytest
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from tpeft_deploy.runtime.text.image_tiles import Grid, grid_of


@pytest.mark.parametrize("tiles", [(1, 12), (2, 6), (1, 2), (3, 3)])
def test_the_grid_is_that_of_the_image_processor(tiles: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    sizes = [*map(tuple, random.integers(1, 1500, (300, 2)).tolist()), (448, 448), (896, 448), (300, 900), (640, 640)]
    for width, height in sizes:
        wanted = get_optimal_tiled_canvas((height, width), (448, 448), *tiles)
        assert tuple(grid_of((width, height), (448, 448), tiles)) == wanted


def test_several_tiles_have_the_whole_image_with_them() -> None:
    assert [Grid(1, 1).pieces, Grid(2, 1).pieces, Grid(3, 4).pieces] == [1, 3, 13]
