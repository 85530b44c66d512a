from __future__ import annotations

from pathlib import Path

import pytest

from tpeft_deploy.files import move_into, new_directory, new_file, replace_text, staging


def test_a_failure_leaves_the_old_file_and_no_remains(tmp_path: Path) -> None:
    place = tmp_path / "file"
    replace_text(place, "old")
    with pytest.raises(ZeroDivisionError), new_file(place) as new:
        new.write_text("half")
        raise ZeroDivisionError
    assert [f.name for f in tmp_path.iterdir()] == ["file"]
    assert place.read_text() == "old"


def test_a_failure_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "made") as new:
        (new / "part").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_new_directory_never_replaces_one_with_content(tmp_path: Path) -> None:
    place = tmp_path / "made"
    place.mkdir()
    (place / "mine").write_text("kept")
    with pytest.raises(OSError, match="not empty"), new_directory(place) as new:
        (new / "part").write_text("new")
    assert (place / "mine").read_text() == "kept"
    assert [f.name for f in tmp_path.iterdir()] == ["made"]


def test_staging_moves_what_is_asked_and_drops_the_rest(tmp_path: Path) -> None:
    with staging(tmp_path) as new:
        (new / "kept").write_text("1")
        (new / "dropped").write_text("2")
        move_into(tmp_path, [new / "kept"])
    assert [f.name for f in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").stat().st_mode & 0o777 != 0o600
