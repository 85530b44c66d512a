"""Output directory of the quickstart: written to a temporary directory and renamed; keeps the user's files."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpeft_deploy.errors import TpeftError
from tpeft_deploy.files import digest_file, new_directory

__all__ = ["MARKER", "output_directory"]

MARKER = ".quickstart.json"


@contextmanager
def output_directory(out: Path) -> Iterator[Path]:
    """Yield a directory to fill; it is renamed to `out` at the end, removed on failure.

    Files of an earlier quickstart are replaced.  Files that the user added or changed are kept, with the suffix `.kept`
    if the new quickstart has a file of that name.

    Raises:
        TpeftError: `out` holds files that no quickstart wrote.
    """
    out = out.resolve()
    written = _written_before(out)
    aside: Path | None = None
    try:
        with new_directory(out) as new:
            yield new
            _mark(new)
            if written is not None:
                aside = _move_aside(out)
    except BaseException:
        if aside is not None and not out.exists():
            aside.rename(out)
        raise
    if aside is not None and written is not None:
        _keep_users_files(aside, out, written)
        shutil.rmtree(aside)


def _written_before(out: Path) -> dict[str, str] | None:
    """Relative path -> digest of the files of an earlier quickstart; None if `out` is new or empty."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        written: dict[str, str] = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TpeftError(
            f"write the quickstart to {out}",
            expected="a new or empty directory, or an earlier quickstart's",
            got="a directory with other files" if out.is_dir() else "a file",
            fix="Choose another with --out.",
        ) from error
    return written


def _mark(directory: Path) -> None:
    files = {str(file.relative_to(directory)): digest_file(file) for file in _files(directory)}
    marker = directory / MARKER
    marker.write_text(json.dumps(files, indent=1, sort_keys=True) + "\n")
    # safetensors writes files that only the owner can read.
    for name in files:
        (directory / name).chmod(marker.stat().st_mode)


def _move_aside(out: Path) -> Path:
    holder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
    return out.rename(holder)


def _keep_users_files(aside: Path, out: Path, written: dict[str, str]) -> None:
    # Files with free names first, so that those kept by an earlier quickstart keep their names.
    for file in sorted(_files(aside), key=lambda file: (out / file.relative_to(aside)).exists()):
        name = str(file.relative_to(aside))
        ours = name == MARKER or (name in written and not file.is_symlink() and digest_file(file) == written[name])
        if ours:
            continue
        place = out / name
        while place.exists():
            place = place.with_name(f"{place.name}.kept")
        place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(place)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
