import stat
from pathlib import Path

import pytest

from tpeft_deploy.errors import TpeftError
from tpeft_deploy.quickstart.place import MARKER, output_directory


def fill(out: Path, **files: str) -> None:
    with output_directory(out) as new:
        for name, text in files.items():
            (new / name).write_text(text)
            (new / "bundle").mkdir(exist_ok=True)
            (new / "bundle" / name).write_text(text)


def names(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {MARKER}


@pytest.mark.parametrize("exists", [True, False])
def test_a_new_or_empty_directory_is_filled(tmp_path: Path, exists: bool) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    fill(out, a="1")
    assert names(out) == {"a", "bundle/a"}
    assert list(tmp_path.iterdir()) == [out]


def test_an_earlier_quickstart_gives_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, a="1", b="1")
    fill(out, a="2", c="2")
    assert names(out) == {"a", "c", "bundle/a", "bundle/c"}
    assert (out / "a").read_text() == "2"
    assert list(tmp_path.iterdir()) == [out]


def test_what_the_user_added_or_changed_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, a="1", b="1")
    (out / "mine.onnx").write_text("mine")
    (out / "bundle" / "deep").mkdir()
    (out / "bundle" / "deep" / "mine").write_text("mine")
    (out / "a").write_text("edited")
    (out / "b").write_text("edited too")
    (out / "link").symlink_to("nowhere")
    fill(out, a="2")
    assert names(out) == {"a", "a.kept", "b", "bundle/a", "mine.onnx", "bundle/deep/mine"}
    assert (out / "a").read_text() == "2"
    assert (out / "a.kept").read_text() == "edited"
    assert (out / "link").is_symlink()
    (out / "a").write_text("edited again")
    fill(out, a="3")
    assert (out / "a.kept").read_text() == "edited"
    assert (out / "a.kept.kept").read_text() == "edited again"


def test_other_directories_and_files_are_refused_before_anything_runs(tmp_path: Path) -> None:
    directory, file, damaged = tmp_path / "directory", tmp_path / "file", tmp_path / "damaged"
    for place in (directory, damaged):
        place.mkdir()
    (directory / "thesis.tex").write_text("years")
    (damaged / MARKER).write_text("{")
    file.write_text("years")
    for out in (directory, file, damaged):
        with pytest.raises(TpeftError, match=r"Choose another with --out\.") as caught, output_directory(out):
            pytest.fail("the block ran")
        assert str(out) in str(caught.value)
    assert (directory / "thesis.tex").read_text() == "years"
    assert set(tmp_path.iterdir()) == {directory, file, damaged}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_earlier_one(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    fill(out, a="1")
    with pytest.raises(error), output_directory(out) as new:
        (new / "a").write_text("half")
        raise error
    assert (out / "a").read_text() == "1"
    assert list(tmp_path.iterdir()) == [out]


def test_a_failure_at_the_last_moment_brings_the_earlier_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    fill(out, a="1")

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"), output_directory(out) as new:
        (new / "a").write_text("2")
        monkeypatch.setattr("os.fsync", full)
    assert (out / "a").read_text() == "1"
    assert list(tmp_path.iterdir()) == [out]


def test_private_files_become_shared_ones(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_directory(out) as new:
        (new / "private").write_text("1")
        (new / "private").chmod(0o600)
    modes = {stat.S_IMODE((out / name).stat().st_mode) for name in ("private", MARKER)}
    assert len(modes) == 1
