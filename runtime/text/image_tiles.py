"""Tiles of an image: the grid that transformers' GotOcr2ImageProcessor cuts it into, as InternVL reads images."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Grid", "cut_image", "grid_of"]


class Grid(NamedTuple):
    """Tiles of an image; of several, the whole image is one more."""

    columns: int
    rows: int

    @property
    def pieces(self) -> int:
        """Number of pictures that the image becomes."""
        tiles = self.columns * self.rows
        return tiles + 1 if tiles > 1 else tiles


def grid_of(size: tuple[int, int], tile: tuple[int, int], tiles: tuple[int, int]) -> Grid:
    """Return the grid with the ratio of sides that is the closest to an image's.

    Of several such grids, the larger one is taken while the image has more than half of its pixels.

    Args:
        size: width and height of the image.
        tile: height and width of a tile.
        tiles: least and greatest number of tiles.
    """
    ratio, area = size[0] / size[1], math.prod(size)
    best, least = Grid(1, 1), math.inf
    for grid in _grids(*tiles):
        difference = abs(ratio - grid.columns / grid.rows)
        if difference < least:
            best, least = grid, difference
        elif difference == least and area > 0.5 * math.prod(tile) * grid.columns * grid.rows:
            best = grid
    return best


def cut_image(image: Image.Image, tile: tuple[int, int], tiles: tuple[int, int], resample: int) -> list[Image.Image]:
    """Return the tiles of an image, row by row; of several, the whole image in the size of one behind them.

    Args:
        image: image.
        tile: height and width of a tile.
        tiles: least and greatest number of tiles.
        resample: number of Pillow's filter.
    """
    height, width = tile
    grid = grid_of(image.size, tile, tiles)
    whole = image.resize((width * grid.columns, height * grid.rows), resample)
    places = [(column * width, row * height) for row in range(grid.rows) for column in range(grid.columns)]
    found = [whole.crop((left, top, left + width, top + height)) for left, top in places]
    return [*found, image.resize((width, height), resample)] if len(found) > 1 else found


@functools.lru_cache(maxsize=8)
def _grids(least: int, most: int) -> tuple[Grid, ...]:
    """All grids with so many tiles, in the order in which ties between them are decided."""
    sides = range(1, most + 1)
    found = [Grid(columns, rows) for columns in sides for rows in sides if least <= columns * rows <= most]
    return tuple(sorted(found, key=math.prod))
