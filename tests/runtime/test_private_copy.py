"""A runtime's own copy of its files: there as long as its process needs it, and no longer."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tpeft_deploy import Adapter, Bundle, Runtime
from tpeft_deploy.errors import AdapterError, RunError, TpeftError
from tpeft_deploy.runtime.private_copy import PrivateCopy


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where copies go during a test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_process_left_is_removed_and_nothing_in_use(conv_bundle: Bundle, place: Path) -> None:
    used = PrivateCopy(conv_bundle, ["base.onnx"])
    left, other = place / "tpeft-deploy-left", place / "tpeft-deploy-not-ours"
    for directory in (left, other):
        directory.mkdir()
    (left / "lock").touch()
    (left / "weights.data").write_bytes(b"0")
    new = PrivateCopy(conv_bundle, [])
    assert sorted(place.iterdir()) == sorted([used.path, new.path, other])
    assert (used.path / "base.onnx").read_bytes() == (conv_bundle.path / "base.onnx").read_bytes()
    for copy in (used, new):
        copy.close()
    assert list(place.iterdir()) == [other]


def test_a_forked_process_leaves_the_copy_to_the_one_that_made_it(
    conv_bundle: Bundle, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers that fork their workers end each with all finalizers, while the others go on."""
    copy = PrivateCopy(conv_bundle, ["base.onnx"])
    monkeypatch.setattr(os, "getpid", lambda: 0)
    copy.close()
    assert (copy.path / "base.onnx").is_file()


def test_a_copy_without_room_says_where_it_would_be(
    conv_bundle: Bundle, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place / "missing"))
    with pytest.raises(RunError, match="TMPDIR"):
        PrivateCopy(conv_bundle, ["base.onnx"])


@pytest.mark.parametrize("step", ["replica.open_banked", "component_files.Layout.of", "runtime.Runtime._preload"])
def test_a_runtime_that_does_not_open_leaves_nothing(
    conv_bundle: Bundle, place: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RunError("open", problem="no")

    monkeypatch.setattr(f"tpeft_deploy.runtime.{step}", fail)
    with pytest.raises(TpeftError) as kept:
        Runtime(conv_bundle.path, provider="cpu")
    assert kept.value.__traceback__ is not None  # which refers to the runtime, so that nothing collects it
    assert not list(place.iterdir())


def test_errors_name_the_bundle_and_not_its_copy(conv_bundle: Bundle) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu", preload=False)
    with pytest.raises(AdapterError, match=repr(conv_bundle.manifest.name)) as caught:
        runtime.load("bad", Adapter({}, {"head.bias": np.zeros(3, np.float32)}))
    assert "/" not in str(caught.value)
