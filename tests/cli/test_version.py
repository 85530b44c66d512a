from __future__ import annotations

import platform

import onnxruntime
import pytest

from tests.helpers.commands import succeed
from tpeft_deploy import __version__, installed


def test_versions_and_providers_on_one_line() -> None:
    build = onnxruntime.capi.build_and_package_info.package_name
    providers = ", ".join(installed.ONNX_RUNTIMES[build])
    own = f"tpeft-deploy {__version__}, Python {platform.python_version()}"
    assert succeed("--version") == f"{own}, {build} {onnxruntime.__version__} ({providers})\n"


@pytest.mark.parametrize(
    ("found", "words"),
    [({}, "without ONNX Runtime"), ({"onnxruntime": "1", "onnxruntime-gpu": "2"}, "overwrite each other")],
)
def test_other_environments(found: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "onnx_runtimes", lambda: found)
    assert words in succeed("--version")
