"""The command line as a user meets it: in a process of its own, with files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import nets
from tests.helpers.commands import BASE, call, fail, succeed
from tpeft_deploy import Adapter, Bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, conv_adapters: dict[str, Adapter]) -> Path:
    """Adapter directories, in the canonical format."""
    place = tmp_path_factory.mktemp("adapters")
    for task, adapter in conv_adapters.items():
        (place / task).mkdir()
        (place / task / "adapter.safetensors").write_bytes(adapter.to_bytes())
    return place


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    file = tmp_path / "in.npz"
    np.savez(file, pixels=np.random.default_rng(0).standard_normal((3, 1, 12, 14)).astype(np.float32))
    return file


def test_the_whole_path(tmp_path: Path, adapters: Path, batch: Path) -> None:
    bundle, out = tmp_path / "my.bundle", tmp_path / "out.npz"
    exported = json.loads(
        succeed("export", "bundle", BASE, "--out", bundle, "--adapter", f"two={adapters / 'two'}", "--json")
    )
    assert exported["name"] == "my.bundle"
    assert exported["rows"] == "each"
    assert all(check["error"] <= check["limit"] for check in exported["gate"])
    added = json.loads(succeed("adapter", "add", bundle, f"plain={adapters / 'plain'}", "--json"))
    listed = json.loads(succeed("adapter", "list", bundle, "--json"))
    assert [task["task"] for task in listed["tasks"]] == ["plain", "two"]
    assert added["tasks"][0] == {**listed["tasks"][0], "left_out": {}}

    ran = json.loads(succeed("run", bundle, "--input", batch, "--output", out, "--tasks", "two,base,plain", "--json"))
    assert [entry["shape"] for entry in ran["outputs"]] == [[2], [10], [10]]
    with np.load(out) as answers:
        rows = [answers[f"logits.{i}"] for i in range(3)]
    succeed("run", bundle, "--input", batch, "--output", out, "--task", "two")
    with np.load(out) as answers:
        np.testing.assert_allclose(answers["logits"][0], rows[0], rtol=1e-5, atol=1e-6)
    succeed("run", bundle, "--input", batch, "--output", out, "--task", "two", "--devices", "0,1")
    with np.load(out) as answers:
        np.testing.assert_allclose(answers["logits"][0], rows[0], rtol=1e-5, atol=1e-6)
    assert "each once" in fail("run", bundle, "--input", batch, "--output", out, "--devices", "0,0")
    assert "such as 0,1" in fail("run", bundle, "--input", batch, "--output", out, "--devices", "0-1", code=2)
    succeed("run", bundle, "--input", batch, "--output", out, "--tasks", "plain,base,plain")
    with np.load(out) as answers:
        assert answers["logits"].shape == (3, 10)
        np.testing.assert_allclose(answers["logits"][2], rows[2], rtol=1e-5, atol=1e-6)
    succeed("run", bundle, "--input", batch, "--output", out)
    with np.load(out) as answers:
        np.testing.assert_allclose(answers["logits"][1], rows[1], rtol=1e-5, atol=1e-6)

    succeed("adapter", "remove", bundle, "two")
    assert "'two'" in fail("run", bundle, "--input", batch, "--output", out, "--task", "two")


def test_export_folded(tmp_path: Path, adapters: Path) -> None:
    document = json.loads(succeed("export", "folded", BASE, adapters / "two", "--out", tmp_path / "m.onnx", "--json"))
    assert document["bytes"] == (tmp_path / "m.onnx").stat().st_size
    assert [check["sizes"]["batch"] for check in document["gate"]] == [2, 5]
    assert "folded" in succeed("export", "folded", BASE, adapters / "two", "--out", tmp_path / "m.onnx")


def test_inspect(adapters: Path, conv_adapters: dict[str, Adapter]) -> None:
    document = json.loads(succeed("inspect", adapters / "two", "--base", BASE, "--json"))
    found = {entry["weight"]: entry for entry in document["weights"]}
    delta = conv_adapters["two"].deltas["stem.weight"]
    assert found["stem.weight"]["ranks"] == list(delta.ranks)
    assert found["stem.weight"]["norm"] == pytest.approx(np.linalg.norm(delta.dense()))
    weight = nets.conv_net()[0].get_parameter("stem.weight").norm().item()
    assert found["stem.weight"]["share"] == pytest.approx(np.linalg.norm(delta.dense()) / weight, rel=1e-5)
    assert found["head.weight"]["change"] == "override"
    table = succeed("inspect", adapters / "two")
    assert "12 x 1 x 4 x 4" in table
    assert f"{conv_adapters['two'].parameters} parameters" in table


def test_tables_show_every_field_in_a_pipe(conv_bundle: Bundle) -> None:
    table = succeed("adapter", "list", conv_bundle.path)
    assert all(task in table and digest in table for task, digest in conv_bundle.tasks.items())


def test_help_and_wrong_usage() -> None:
    assert {"inspect", "convert", "export", "adapter", "verify", "run", "quickstart"} <= set(succeed("--help").split())
    for command in (
        "inspect",
        "convert",
        "export folded",
        "export bundle",
        "adapter add",
        "verify",
        "run",
        "quickstart",
    ):
        assert "--debug" in succeed(*command.split(), "--help")
    assert "TASK=ADAPTER" in fail("adapter", "add", "bundle", "nothing", code=2)
    assert "exclude" in fail("run", "b", "--input", "i", "--output", "o", "--task", "a", "--tasks", "a,b", code=2)
    assert "twice" in fail("export", "bundle", BASE, "--out", "b", "--adapter", "a=x", "--adapter", "a=y", code=2)
    assert fail("no-such-command", code=2)


def per_pixel() -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict[str, object]]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 1), torch.nn.ReLU(), torch.nn.Conv1d(4, 2, 1))
    return module.eval(), {"input": torch.randn(2, 3, 6)}, {"input": {0: "batch", 2: "time"}}


def test_inputs_that_may_be_padded(tmp_path: Path) -> None:
    export = ("export", "bundle", "tests.cli.test_cli:per_pixel", "--out", tmp_path / "b")
    assert "twice" in fail(*export, "--pad", "input=0", "--pad", "input=1", code=2)
    for wrong in ("input", "input=zero", "=1"):
        assert "--pad" in fail(*export, "--pad", wrong, code=2)
    for rest in ([], ["--dry-run"]):
        assert "pad input 'x' of base per_pixel: expected one of input" in fail(*export, "--pad", "x=0", *rest)
    document = json.loads(succeed(*export, "--pad", "input=-1.5", "--json"))
    assert "padded" in {check["form"] for check in document["gate"]}
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.inputs[0].pad == -1.5
    assert manifest.paddable == {"time"}
    assert "padded" in succeed("verify", tmp_path / "b")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    for arguments in (["--debug", "adapter", "list"], ["adapter", "list", "--debug"]):
        result = call(*arguments, tmp_path)
        assert result.exit_code == 1
        assert type(result.exception).__name__ == "BundleError"


def damaged(path: Path, source: Path, change: object) -> Path:
    shutil.copytree(source, path)
    file = path / "adapter.safetensors"
    data = file.read_bytes()
    if change == "truncated":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.write_bytes(data[:-4] + np.float32("nan").tobytes())
    return path


def test_bad_input_is_one_line_with_exit_code_1_and_nothing_written(
    tmp_path: Path, adapters: Path, own_bundle: Bundle, batch: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    strange = Adapter({"stem.weight": nets.delta((12, 1, 4, 4), (1, 1, 2, 2), 0)}, {}, {"stem.weight": "0" * 64})
    (other / "adapter.safetensors").write_bytes(strange.to_bytes())
    truncated = damaged(tmp_path / "truncated", adapters / "two", "truncated")
    poisoned = damaged(tmp_path / "poisoned", adapters / "two", "nan")
    bundle, out = own_bundle.path, tmp_path / "out.npz"
    before = sorted(str(p) for p in tmp_path.rglob("*"))

    run = ("run", bundle, "--input", batch, "--output", out)
    assert "trained on another base, expected base weight 000000000000" in fail("adapter", "add", bundle, f"x={other}")
    assert "another base" in fail("export", "folded", BASE, other, "--out", tmp_path / "m.onnx")
    assert "another base" in fail("export", "bundle", BASE, "--out", tmp_path / "b", "--adapter", f"x={other}")
    assert "expected one of base, partial, plain, two, wide, got 'nope'" in fail(*run, "--task", "nope")
    assert "run task 'nope' for row 1" in fail(*run, "--tasks", "two,nope,two")
    assert "3 for its 3 rows, got 2 tasks" in fail(*run, "--tasks", "two,two")
    assert "complete safetensors file" in fail("adapter", "add", bundle, f"x={truncated}")
    assert "complete safetensors file" in fail("inspect", truncated)
    assert "1 of " in fail("adapter", "add", bundle, f"x={poisoned}")
    assert "NaN" in fail("inspect", poisoned)
    assert "nothing there" in fail("inspect", tmp_path / "missing")
    assert "nothing there" in fail("adapter", "add", bundle, f"x={tmp_path / 'missing'}")
    assert "no such directory" in fail("run", tmp_path / "missing", "--input", batch, "--output", out)
    assert "No such file" in fail("run", bundle, "--input", tmp_path / "missing", "--output", out)
    assert "no such directory" in fail("adapter", "list", tmp_path / "missing")
    assert "callable" in fail(
        "export", "folded", "tests.helpers.nets:missing", adapters / "two", "--out", tmp_path / "m.onnx"
    )
    assert "name a task 'base'" in fail("adapter", "add", bundle, f"base={adapters / 'two'}")
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before

    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace(own_bundle.manifest.base_digest, "0" * 64))
    for command in (run, ("adapter", "list", bundle), ("adapter", "add", bundle, f"x={adapters / 'two'}")):
        assert "digest" in fail(*command)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_an_unexpected_error_is_one_line_too(monkeypatch: pytest.MonkeyPatch, conv_bundle: Bundle) -> None:
    def broken(path: object) -> Bundle:
        raise RuntimeError("a\nbug")

    monkeypatch.setattr(Bundle, "open", broken)
    result = call("adapter", "list", conv_bundle.path)
    assert result.exit_code == 1
    assert result.stderr == "Error: unexpected RuntimeError: a bug. Run again with --debug, and please report it.\n"


def test_a_command_in_a_process_of_its_own_says_nothing_but_its_table(tmp_path: Path, adapters: Path) -> None:
    """Libraries log through their own handlers, which only a fresh process shows."""
    command = [sys.executable, "-c", "from tpeft_deploy.cli import main; main()"]
    arguments = ["export", "bundle", BASE, "--out", str(tmp_path / "new"), "--adapter", f"two={adapters / 'two'}"]
    done = subprocess.run(
        [*command, *arguments, "--folded", "--quiet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines()[0].split() == ["form", "task", "sizes", "error", "limit"]


def test_a_closed_pipe_is_no_error_to_report(conv_bundle: Bundle) -> None:
    script = "from tpeft_deploy.cli import main; main()"
    command = [sys.executable, "-c", script, "adapter", "list", str(conv_bundle.path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
