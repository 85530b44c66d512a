"""Files that are cut short, overwritten or replaced under a runtime that serves them.

ONNX Runtime maps adapter files and external weights into memory: a file cut short kills the process that serves it
with SIGBUS, one written in place changes its answers.  So those tests run in processes of their own.
Sections of research, as in (research, 1.3), are those of research/onnxruntime-adapters.md.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tpeft_deploy import Adapter, Bundle, Runtime
from tpeft_deploy.errors import IntegrityError

ROOT = Path(__file__).parents[3]
SERVE = """
import os, sys
import numpy as np
from tpeft_deploy import Runtime
bundle, adapter, harmed, how = sys.argv[1:]
runtime = Runtime(bundle, provider="cpu", threads=1)
runtime.load("mine", adapter)
inputs = {"pixels": np.random.default_rng(0).standard_normal((3, 1, 12, 14)).astype("float32")}
tasks = ["mine", "two", "base", "wide", "plain"]
before = [runtime.run(inputs, task=task)["logits"] for task in tasks]
size = os.path.getsize(harmed)
with open(harmed, "r+b") as stream:
    if how == "truncated":
        stream.truncate(0)
    elif how == "overwritten":
        stream.write(bytes(range(251)) * (size // 251 + 1))
after = [runtime.run(inputs, task=task)["logits"] for task in tasks]
assert all(np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(before, after)), "other answers"
print("served")
"""


def serve(bundle: Bundle, adapter: Adapter, harmed: str, how: str) -> subprocess.CompletedProcess[str]:
    file = bundle.path.parent / "mine.safetensors"
    file.write_bytes(adapter.to_bytes())
    names = {"mine": file, "two": bundle.path / "adapters/two" / bundle.digest("two") / "adapter.safetensors"}
    arguments = [str(bundle.path), str(file), str(names.get(harmed, bundle.path / harmed)), how]
    return subprocess.run(
        [sys.executable, "-c", SERVE, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize(
    ("harmed", "how"),
    [
        ("mine", "untouched"),  # the harness serves at all
        *(
            (file, how)
            for file in ("mine", "two", "manifest.json", "banked.onnx")
            for how in ("truncated", "overwritten")
        ),
    ],
)
def test_a_file_harmed_while_it_is_served_changes_nothing(
    own_bundle: Bundle, conv_adapters: dict[str, Adapter], harmed: str, how: str
) -> None:
    """A mapped LoraAdapter: truncated, SIGBUS; overwritten, other weights (research, 1.3)."""
    done = serve(own_bundle, conv_adapters["plain"], harmed, how)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout == "served\n"


@pytest.mark.parametrize("how", ["truncated", "overwritten"])
def test_weights_harmed_while_they_are_served_change_nothing(
    own_bundle: Bundle, conv_adapters: dict[str, Adapter], how: str
) -> None:
    """The same for external weights, which ONNX Runtime maps on the CPU."""
    done = serve(own_bundle, conv_adapters["plain"], "weights.data", how)
    assert done.returncode == 0, (done.returncode, done.stderr)


INPUTS = {"pixels": np.random.default_rng(0).standard_normal((3, 1, 12, 14)).astype(np.float32)}


def test_weights_replaced_by_others_do_not_become_the_base(
    own_bundle: Bundle, conv_adapters: dict[str, Adapter]
) -> None:
    """Somebody exports again to the same place, as one should: beside it, then renamed."""
    runtime = Runtime(own_bundle.path, provider="cpu", threads=1)
    before = runtime.run(INPUTS)["logits"]
    other = own_bundle.path / ".weights.new"
    other.write_bytes(bytes(own_bundle.manifest.files["weights.data"].bytes))
    other.replace(own_bundle.path / "weights.data")
    with contextlib.suppress(IntegrityError):  # saying so would do
        runtime.load("mine", conv_adapters["plain"])
    np.testing.assert_allclose(runtime.run(INPUTS)["logits"], before, rtol=1e-4, atol=1e-6)


def test_a_bundle_that_is_removed_is_served_on(own_bundle: Bundle) -> None:
    runtime = Runtime(own_bundle.path, provider="cpu", threads=1)
    tasks = ["base", *runtime.tasks]
    before = {task: runtime.run(INPUTS, task=task)["logits"] for task in tasks}
    shutil.rmtree(own_bundle.path)
    for task, expected in before.items():
        np.testing.assert_allclose(runtime.run(INPUTS, task=task)["logits"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "what",
    [
        "runs",
        "loads",
    ],
)
def test_a_relative_path_means_where_it_was_given(
    own_bundle: Bundle, conv_adapters: dict[str, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A server that changes its directory, to become a daemon."""
    monkeypatch.chdir(own_bundle.path.parent)
    Path("mine.safetensors").write_bytes(conv_adapters["two"].to_bytes())
    runtime = Runtime(own_bundle.path.name, provider="cpu", threads=1)
    runtime.load("mine", "mine.safetensors")
    expected = runtime.run(INPUTS, task="two")["logits"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    if what == "loads":
        runtime.load("again", conv_adapters["two"])
        np.testing.assert_array_equal(runtime.run(INPUTS, task="again")["logits"], expected)
    np.testing.assert_array_equal(runtime.run(INPUTS, task="mine")["logits"], expected)


def test_a_bundle_altered_before_it_is_opened_is_refused(own_bundle: Bundle) -> None:
    """The same size and other bytes, in each of the files that are served from."""
    for name in ("weights.data", "banked.onnx", f"adapters/two/{own_bundle.digest('two')}/adapter.safetensors"):
        file = own_bundle.path / name
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=os.path.basename(name)):
            Runtime(own_bundle.path, provider="cpu", threads=1)
        file.write_bytes(good)
