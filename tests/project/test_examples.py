from __future__ import annotations

import ast
import math
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(directory: Path, script: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=directory, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.thorough
def test_the_examples_run(tmp_path: Path) -> None:
    assert "tensor" not in run(tmp_path, "two_tasks.py")
    assert (tmp_path / "rotated.onnx").is_file()
    printed = run(tmp_path, "plain_onnxruntime.py", tmp_path / "bundle", "mirrored")
    assert "base:" in printed
    assert "mirrored:" in printed
    residency, difference = run(tmp_path, "many_tasks.py").splitlines()
    assert ast.literal_eval(residency) == {"mirrored": "folded", "rotated": "device", "third": "device"}
    assert float(difference.removeprefix("largest difference:")) < 1e-4


@pytest.mark.parametrize(("name", "lines"), [("two_tasks.py", 20), ("many_tasks.py", 26)])
def test_the_readme_quotes_the_example(name: str, lines: int) -> None:
    script = (ROOT / "examples" / name).read_text()
    quoted = script.split("# README begins\n")[1].split("# README ends")[0]
    assert quoted in (ROOT / "README.md").read_text()
    assert len(quoted.splitlines()) <= lines


def test_the_readme_names_real_files_and_commands() -> None:
    from click.testing import CliRunner

    from tpeft_deploy.cli import main

    readme = (ROOT / "README.md").read_text()
    for line in readme.splitlines():
        if line.startswith("    tpeft-deploy "):
            words = line.split()[1:]
            names = words[:2] if words[0] in {"export", "adapter"} else words[:1]
            assert CliRunner().invoke(main, [*names, "--help"]).exit_code == 0
    examples = [f"examples/{script}" for script in ("two_tasks.py", "many_tasks.py", "plain_onnxruntime.py")]
    for name in ("docs/forms.svg", *examples, "CONTRIBUTING.md"):
        assert name in readme
        assert (ROOT / name).is_file()


def test_the_parts_of_the_example_for_text_work(tmp_path: Path) -> None:
    example: Any = runpy.run_path(str(ROOT / "examples" / "three_styles.py"))
    texts = example["sources"]()
    assert texts.keys() == {"base", *example["STYLES"]}
    assert min(map(len, texts.values())) > 20_000
    tokenizer = example["byte_level_tokenizer"](texts.values())
    assert len(tokenizer) == example["VOCABULARY"]
    assert tokenizer.decode(tokenizer.encode("naïve €")) == "naïve €"
    torch.manual_seed(0)
    model = example["language_model"](hidden=32, layers=1)
    repeated = torch.tensor(tokenizer.encode("one two " * 100))
    assert example["train"](model, repeated, 25, math.inf, 2e-2, "base", rows=4) < 2.5  # nats; ln 1024 = 6.9 before
    shown = example["page"]({"base": "<b>", "code": "x"}, {"trained": "1 s"})
    assert "<pre>&lt;b&gt;</pre>" in shown
