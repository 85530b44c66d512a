"""The doctor with onnxruntime-gpu itself, on a CUDA that computes nothing and a driver that is none."""

from __future__ import annotations

import json

import pytest

from tests.cuda_stub.child import run_child

pytestmark = pytest.mark.cuda_stub


@pytest.mark.parametrize("libraries", [True, False])
def test_the_gpu_build(libraries: bool) -> None:
    done = run_child("tpeft_deploy", "--quiet", "doctor", "--json", libraries=libraries)
    found = json.loads(done.stdout)
    providers = {own["provider"]: own for own in found["providers"]}
    assert providers["cpu"]["works"]
    assert (providers["cuda"]["built"], providers["cuda"]["works"]) == (True, False)
    assert found["driver"]["needs"] == "13.0"
    assert found["driver"]["reason"]
    if libraries:  # the session runs, and what it computes is nothing
        assert providers["cuda"]["reason"].startswith("it computed [")
        assert {own["library"]: own["error"] for own in found["libraries"]} == {
            **dict.fromkeys(["libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13"]),
            **dict.fromkeys(["libcurand.so.10", "libcudnn.so.9"]),
        }
    else:
        assert "libcublasLt.so.13: cannot open shared object file" in providers["cuda"]["reason"]
    assert done.returncode == 1
    assert done.stderr.startswith("Error: check the installation: provider cuda does not work: ")
    assert done.stderr.count("\n") == 1
