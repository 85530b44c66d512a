"""The whole examination, in environments that hold what the metadata says they hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

ROOT = Path(__file__).parents[2]
SITE = Path(onnxruntime.__file__).parents[1]


def distribution(place: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    """Metadata as pip writes them, of a distribution whose files are beside them or nowhere."""
    info = place / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    extras = {line.partition("extra == ")[2].strip("'\"") for line in requires if "extra ==" in line}
    lines = [f"Name: {name}", f"Version: {version}", *(f"Provides-Extra: {extra}" for extra in sorted(extras))]
    lines += [f"Requires-Dist: {line}" for line in requires]
    (info / "METADATA").write_text("Metadata-Version: 2.4\n" + "\n".join(lines) + "\n")


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A site directory with click, rich, numpy and the package, as an installation without extras has them."""
    site = tmp_path / "site"
    site.mkdir()
    for name in ("click", "rich", "packaging", "markdown_it", "mdurl", "pygments", "numpy", "numpy.libs", "msgspec"):
        (site / name).symlink_to(SITE / name)
    for name in ("re2.py", "re2", "_re2.so", "safetensors"):
        if (SITE / name).exists():
            (site / name).symlink_to(SITE / name)
    for file in SITE.glob("_re2*"):
        if not (site / file.name).exists():
            (site / file.name).symlink_to(file)
    (site / "tpeft_deploy").symlink_to(ROOT / "tpeft_deploy")
    distribution(site, "numpy", "2.4.0")
    distribution(
        site,
        "tpeft-deploy",
        "0.1.0",
        (
            "numpy>=1.26",
            "onnxruntime>=1.30; extra == 'cpu'",
            "onnxruntime-gpu[cuda]>=1.30; extra == 'gpu'",
            "brittle>=2; extra == 'train'",
            "absent>=1; extra == 'train'",
        ),
    )
    return site


def doctor(site: Path, **variables: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, document and stderr of the command, in an interpreter that sees nothing but `site`."""
    code = (
        f"import sys; sys.path[:] = [{str(site)!r}, *(p for p in sys.path if 'site-packages' not in p and p)]; "
        "from tpeft_deploy.cli import main; main(['--quiet', 'doctor', '--json'])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        env={**os.environ, **variables},
        cwd=site.parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def states(found: Mapping[str, Any]) -> dict[str, str]:
    return {extra["extra"]: extra["state"] for extra in found["extras"]}


def works(found: Mapping[str, Any]) -> dict[str, bool]:
    return {own["provider"]: own["works"] for own in found["providers"]}


def test_without_extras_nothing_is_broken(environment: Path) -> None:
    code, found, stderr = doctor(environment)
    assert (code, found["problems"], stderr) == (0, [], "")
    assert states(found) == {"": "complete", "cpu": "not installed", "gpu": "not installed", "train": "not installed"}
    assert not any(works(found).values())
    assert all("tpeft-deploy[cpu]" in own["reason"] for own in found["providers"])
    assert next(e for e in found["extras"] if e["extra"] == "gpu")["install"] == "pip install 'tpeft-deploy[gpu]'"


def test_the_cpu(environment: Path) -> None:
    for name in ("onnxruntime", "flatbuffers", "google"):
        if not (environment / name).exists():
            (environment / name).symlink_to(SITE / name)
    distribution(environment, "onnxruntime", onnxruntime.__version__)
    code, found, stderr = doctor(environment)
    assert (code, found["problems"], stderr) == (0, [], "")
    assert states(found)["cpu"] == "complete"
    assert works(found) == {"cpu": True, "cuda": False, "openvino": False, "tensorrt": False}
    gpu = next(e for e in found["extras"] if e["extra"] == "gpu")
    assert gpu["install"] == "pip uninstall --yes onnxruntime && pip install 'tpeft-deploy[gpu]'"


def test_a_gpu_build_without_what_it_needs(environment: Path) -> None:
    """The metadata promise CUDA; the files are those of the build that has none."""
    (environment / "onnxruntime").symlink_to(SITE / "onnxruntime")
    (environment / "flatbuffers").symlink_to(SITE / "flatbuffers")
    distribution(environment, "onnxruntime-gpu", "1.31.0", ("nvidia-cuda-runtime~=13.0; extra == 'cuda'",))
    code, found, stderr = doctor(environment)
    assert code == 1
    assert works(found)["cpu"]
    [problem] = found["problems"]
    assert problem["what"].startswith("provider cuda does not work: ")
    assert stderr.startswith("Error: check the installation: provider cuda does not work")
    assert stderr.count("\n") == 1
    assert next(e for e in found["extras"] if e["extra"] == "gpu")["missing"] == ["nvidia-cuda-runtime"]


def test_two_builds_overwrite_each_other(environment: Path) -> None:
    (environment / "onnxruntime").symlink_to(SITE / "onnxruntime")
    (environment / "flatbuffers").symlink_to(SITE / "flatbuffers")
    distribution(environment, "onnxruntime", onnxruntime.__version__)
    distribution(environment, "onnxruntime-gpu", "1.31.0")
    code, found, _ = doctor(environment)
    assert code == 1
    [problem] = found["problems"]
    assert problem["what"] == "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other's files"
    assert problem["fix"].startswith("pip uninstall --yes onnxruntime onnxruntime-gpu && ")


def test_what_crashes_or_does_not_fit_is_named(environment: Path) -> None:
    distribution(environment, "brittle", "1.9")
    _, found, _ = doctor(environment)
    assert [problem["what"] for problem in found["problems"]] == ["extra train: brittle 1.9, needs >=2"]
    (environment / "brittle-1.9.dist-info").rename(environment / "old")
    distribution(environment, "brittle", "2.1")
    (environment / "brittle.py").write_text("import os\nos.abort()\n")
    (environment / "onnxruntime.py").write_text("raise ImportError('libfoo.so.1: no such file')\n")
    distribution(environment, "onnxruntime", "1.31.0")
    code, found, _ = doctor(environment)
    assert code == 1
    assert states(found)["train"] == "incomplete"
    first, second = (problem["what"] for problem in found["problems"])
    assert first == "brittle is installed and cannot be imported: the process crashed with SIGABRT"
    assert second.startswith("ONNX Runtime cannot be imported: ")
    assert "libfoo.so.1" in second
