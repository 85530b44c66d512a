import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tpeft_deploy import quickstart
from tpeft_deploy.errors import MissingExtra, TpeftError

ROOT = Path(__file__).parents[2]


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, tpeft_deploy.quickstart; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert not {"torch", "onnx", "onnxruntime", "peft", "sklearn", "matplotlib"} & set(loaded)


@pytest.mark.parametrize(
    ("missing", "extras"), [({"sklearn"}, "examples"), ({"matplotlib", "peft", "onnxruntime"}, "cpu,examples,train")]
)
def test_missing_packages_name_their_extra(
    missing: set[str], extras: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "find_spec", lambda name: None if name in missing else find_spec(name))
    with pytest.raises(MissingExtra) as caught:
        quickstart.run_quickstart(tmp_path / "out")
    assert f"pip install 'tpeft-deploy[{extras}]'" in str(caught.value)
    assert all(name in str(caught.value) for name in missing)
    assert not (tmp_path / "out").exists()


def test_a_directory_with_other_files_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    stages: list[str] = []
    with pytest.raises(TpeftError, match="Choose another with --out"):
        quickstart.run_quickstart(tmp_path, provider="cpu", on_stage=stages.append)
    assert stages == ["load torch, PEFT and scikit-learn"]
