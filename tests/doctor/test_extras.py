from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tpeft_deploy.doctor.extras import Extra, modules


def _distribution(place: Path, name: str, files: tuple[str, ...]) -> None:
    info = place / f"{name.replace('-', '_')}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in (*files, f"{info.name}/METADATA")))
    for file in files:
        if not file.startswith(".."):
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            (place / file).touch()


def test_modules_have_the_names_under_which_they_were_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _distribution(tmp_path, "plain-name", ("plain_name/__init__.py",))
    _distribution(tmp_path, "wide-sdk", ("wide/sdk/inner/__init__.py", "wide/sdk/__init__.py", "wide/sdk/part.py"))
    _distribution(tmp_path, "programs-alone", ("../../bin/program",))
    _distribution(tmp_path, "gone", ("gone.py",))
    (tmp_path / "gone.py").unlink()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    present = ("plain-name", "wide-sdk", "programs-alone", "gone")
    assert modules([Extra("more", present, (), ())]) == {
        "plain_name": "plain-name",
        "wide.sdk": "wide-sdk",
        "gone": "gone",
    }
