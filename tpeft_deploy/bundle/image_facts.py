"""Preparation of images, which a bundle records in text/image.json: resized, cropped, scaled and normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from tpeft_deploy.errors import IntegrityError

if TYPE_CHECKING:
    from tpeft_deploy.bundle.directory import Bundle

__all__ = ["IMAGE", "ImageFacts"]

IMAGE = "image.json"


@dataclass(frozen=True)
class ImageFacts:
    """Preparation of an RGB image, in the order of the fields; None leaves a step out.

    Args:
        resize: (height, width), or (size of the shorter side,).
        resample: number of Pillow's filter for it.
        crop: height and width of the middle that is kept; zeros around smaller images.
        scale: factor of the values, 0 to 255 before.
        mean: mean of each channel, subtracted.
        std: divisor of each channel.
        tiles: least and greatest number of tiles of the size `resize` that an image is cut into; None for one picture.
        before: tokens of a prompt in front of the placeholders of an image.
        after: tokens behind them.
    """

    resize: tuple[int, ...] | None = None
    resample: int = 3
    crop: tuple[int, int] | None = None
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    tiles: tuple[int, int] | None = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def read(cls, bundle: Bundle) -> ImageFacts | None:
        """Read the facts of the component that generates; None where it records none.

        Raises:
            IntegrityError: the file is damaged.
        """
        if IMAGE not in bundle.manifest.text:
            return None
        try:
            return msgspec.json.decode(bundle.check_file(f"text/{IMAGE}").read_bytes(), type=cls)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise IntegrityError(f"read {IMAGE} of bundle {bundle.path}", problem=str(error)) from error
