from __future__ import annotations

import json

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest

from tpeft_deploy.runtime.sessions import trial


def test_the_model_is_valid_and_its_answer_the_reference_s() -> None:
    model = onnx.load_from_string(trial.MODEL)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Conv", "MatMul"]
    reference = onnx.reference.ReferenceEvaluator(model)
    [answer] = reference.run(None, {"x": np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)})
    assert np.asarray(answer).tolist() == [[[[6, 8], [22, 32]]]]


def test_the_cpu_works_and_what_is_not_built_does_not() -> None:
    assert trial.try_provider("cpu") == {"built": True, "works": True, "reason": "a session ran on the CPU"}
    if "OpenVINOExecutionProvider" not in onnxruntime.get_available_providers():
        found = trial.try_provider("openvino")
        assert found == {"built": False, "works": False, "reason": "this onnxruntime was built without OpenVINO"}


def test_a_wrong_answer_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_Y", trial._Y + 1)
    found = trial.try_provider("cpu")
    assert (found["built"], found["works"]) == (True, False)
    assert "it computed [6.0, 8.0, 22.0, 32.0]" in found["reason"]


def test_the_process_prints_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["trial", "cpu"])
    trial.main()
    assert json.loads(capsys.readouterr().out)["works"]
