from __future__ import annotations

import json

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tpeft_deploy.errors import ProviderUnavailable
from tpeft_deploy.runtime.sessions import providers
from tpeft_deploy.runtime.sessions.execution_provider import CPU
from tpeft_deploy.runtime.sessions.openvino_provider import OpenvinoProvider


@pytest.mark.parametrize(("threads", "more"), [(None, {}), (3, {"num_of_threads": "3"})])
def test_openvino_computes_exactly_on_the_cpu(threads: int | None, more: dict[str, str]) -> None:
    (name, options), rest = OpenvinoProvider().chain(providers.DEFAULT_CUDA, threads)
    config = json.loads(options.pop("load_config"))
    assert config == {"CPU": {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}}
    assert (name, options) == ("OpenVINOExecutionProvider", {"device_type": "CPU"} | more)
    assert rest == (CPU, {})


def test_openvino_is_refused_by_name_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(
        ProviderUnavailable, match=r"OpenVINO.*built without OpenVINO. Install 'tpeft-deploy\[openvino\]'"
    ):
        providers.choose("openvino")


def test_openvino_is_chosen_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["OpenVINOExecutionProvider", CPU])
    assert providers.choose("auto").provider == "cpu"
    choice = providers.choose("openvino")
    assert (choice.device, choice.reference.provider) == ("cpu", "cpu")


def test_is_nan_is_written_as_comparisons() -> None:
    nodes = [
        helper.make_node("IsNaN", ["x"], ["n"]),
        helper.make_node("Not", ["n"], ["y"], name="IsNaN"),
    ]
    ports = [helper.make_tensor_value_info(name, kind, [3]) for name, kind in (("x", 1), ("y", TensorProto.BOOL))]
    file = helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:])).SerializeToString()
    graph = onnx.load_from_string(OpenvinoProvider().graph(file)).graph
    assert [(n.op_type, list(n.input), list(n.output)) for n in graph.node] == [
        ("Equal", ["x", "x"], ["n.tpeft.equal"]),
        ("Not", ["n.tpeft.equal"], ["n"]),
        ("Not", ["n"], ["y"]),
    ]
    plain = file.replace(b"IsNaN", b"IsInf")
    assert OpenvinoProvider().graph(plain) is plain
