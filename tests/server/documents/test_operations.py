"""What docs/server.md and the Dockerfile say, against the code."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from tpeft_deploy.cli import main
from tpeft_deploy.runtime.server.settings import Settings
from tpeft_deploy.runtime.server.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "server.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def table(heading: str) -> list[list[str]]:
    """The rows of the table beneath a heading, without its own."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in row] for row in rows]


def test_every_setting_is_described_as_it_is() -> None:
    described = {row[0]: row[1] for row in table("Settings")}
    assert list(described) == list(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, bool):
            assert described[name] == str(default).lower()
        elif isinstance(default, int) and described[name].endswith("iB"):
            number, unit = re.fullmatch(r"(\d+)([MG])iB", described[name]).groups()  # type: ignore[union-attr]
            assert int(number) * {"M": 2**20, "G": 2**30}[unit] == default
        elif isinstance(default, int | float):
            assert float(described[name]) == default
        else:
            assert described[name] == ("" if default is None else str(default))


def test_every_metric_is_described() -> None:
    metrics = Metrics(1, dict, dict, lambda: 0)
    text = metrics.render().decode()
    names = re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)
    shown = {name for name in names if not name.endswith("_created")}
    assert {row[0] for row in table("Metrics")} == shown


def test_the_image_has_neither_torch_nor_root() -> None:
    build, final = DOCKERFILE.split("FROM ${BASE}\n")
    assert "--require-hashes" in build
    assert re.search(r"^USER tpeft$", final, re.MULTILINE)
    assert final.index("USER tpeft") < final.index("ENTRYPOINT")
    assert 'HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["tpeft-deploy", "health"]' in final
    assert "ORT_DISABLE_TELEMETRY=1" in final
    for name in re.findall(r"TPEFT_([A-Z_]+)=", final):
        assert name.lower() in Settings.model_fields


def versions(file: Path) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==(\S+)", file.read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


@pytest.mark.parametrize("provider", ["cpu", "gpu"])
def test_the_image_installs_what_is_tested_and_needed(provider: str) -> None:
    locked = versions(ROOT / "image" / f"{provider}.txt")
    tested = versions(ROOT / "constraints.txt")
    outside = {"setuptools", "onnxruntime-gpu"} | {name for name in locked if name.startswith("nvidia-")}
    assert {n: v for n, v in locked.items() if n not in outside} == {n: tested[n] for n in locked if n not in outside}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["server"], *extras["postgres"], *extras[provider]]
    names = {re.match(r"[\w.-]+", one)[0].lower() for one in needed}  # type: ignore[index]
    assert names <= set(locked)
    assert not {"torch", "onnx", "onnxscript", "transformers", "peft"} & set(locked)
    assert ("onnxruntime" in locked) != ("onnxruntime-gpu" in locked)


def test_what_the_image_runs_imports_neither_torch_nor_onnx_nor_pickles_reader() -> None:
    code = (
        "import sys\n"
        "import tpeft_deploy.cli.serve, tpeft_deploy.runtime.server.main\n"
        "print([name for name in ('torch', 'onnx', 'onnxscript', 'transformers', 'peft') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    for file in (ROOT / "runtime" / "server").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) (pickle|torch|marshal|shelve|dill)\b", file.read_text(), re.MULTILINE)


def test_keys_finds_the_image_s_state_by_itself(tmp_path: Path) -> None:
    own = {"TPEFT_STATE": str(tmp_path / "state")}
    runner = CliRunner()
    made = runner.invoke(main, ["keys", "create", "--tenant", "acme", "--role", "infer"], env=own)
    assert made.exit_code == 0, made.output
    listed = runner.invoke(main, ["keys", "list", "--state", str(tmp_path / "state")])
    assert "acme" in listed.output


def test_series_are_capped_and_dropped() -> None:
    from tpeft_deploy.runtime.batching.timing import Timing
    from tpeft_deploy.runtime.server.telemetry.inference_events import InferenceEvent

    metrics = Metrics(2, dict, dict, lambda: 0)
    for number in range(50):
        metrics.inference(InferenceEvent("acme", f"task-{number}", [], 1, Timing(0.0), 0.1, failed=False))
    text = metrics.render().decode()
    rows = re.findall(r'^tpeft_rows_total\{task="(\S*)",tenant="\S*"\} (\S+)', text, re.MULTILINE)
    assert dict(rows) == {"task-0": "1.0", "task-1": "1.0", "other": "48.0"}
    metrics.drop("acme", "task-0")
    assert "task-0" not in metrics.render().decode()
