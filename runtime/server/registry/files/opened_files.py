"""Detection of opened files that were removed or replaced."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from tpeft_deploy.errors import Unavailable

__all__ = ["OpenedFiles"]

_log = logging.getLogger("tpeft_deploy.server")


class OpenedFiles:
    """Opened files and directories, identified by device and inode.

    Writes to a removed or replaced file succeed and are lost when the server ends: they must not be acknowledged.

    Args:
        places: paths of the files; a path that does not exist yet is watched from its creation.
    """

    def __init__(self, places: Iterable[Path]) -> None:
        self._known = {place: _identity(place) for place in places}
        self._lost: Path | None = None

    @property
    def intact(self) -> bool:
        """Whether all files were there at the last check."""
        return self._lost is None

    def look(self) -> None:
        """Check the files, and log a change."""
        lost = None
        for place, known in self._known.items():
            now = _identity(place)
            if known is None:
                self._known[place] = now
            elif now != known:
                lost = place
                break
        if lost is not None and self._lost is None:
            _log.error(
                "%s was removed or replaced while the server has it open: changes are refused until it is back, "
                "or the server is started again",
                lost,
            )
        elif lost is None and self._lost is not None:
            _log.warning("%s is back: changes are taken again", self._lost)
        self._lost = lost

    def check(self) -> None:
        """Check the files before a change.

        Raises:
            Unavailable: a file was removed or replaced.
        """
        self.look()
        if self._lost is not None:
            raise Unavailable(
                "change what is registered",
                problem="the server's files were removed or replaced while it runs",
                fix="The operator has to restore them, or to start the server again.",
            )


def _identity(place: Path) -> tuple[int, int] | None:
    try:
        about = os.stat(place)
    except OSError:
        return None
    return about.st_dev, about.st_ino
