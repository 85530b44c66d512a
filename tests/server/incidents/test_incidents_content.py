"""Incidents 3, 5, 10, 12 and 15, and the links of 1, of the table in test_incidents.py: what is in an upload."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import save

from tests.helpers import nets
from tests.helpers.server.audited import Audited, check_tree, infer_message, load_message, tree
from tests.helpers.server.incidents import ask, digest_of, logits
from tests.helpers.server.merged import close, merged
from tests.helpers.server.v2_bodies import tensor
from tests.server.conftest import PIXELS
from tpeft_deploy import Adapter
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.tucker import Array, TuckerDelta


def check_unchanged(server: Audited, others: list[Adapter], before: dict[str, str], name: str = "odd") -> None:
    """Nothing is stored, the name is nobody's, and what was there answers as it did."""
    check_tree(server.place, before)
    assert server.ask("GET", f"/v2/registry/tasks/{name}").status_code == 404
    assert ask(server, name).status_code == 404
    close(logits(ask(server), digest_of(others[0])), merged(others[0]))


def every_way(server: Audited, data: bytes, config: bytes | None = None) -> list[tuple[int, str]]:
    """Statuses and texts of the uploads of a file, in all the ways in which one may be sent."""
    path, load_path = "/v2/registry/tasks/odd/versions", "/v2/repository/models/odd/load"
    files = {"adapter.safetensors": data} | ({"adapter_config.json": config} if config is not None else {})
    form = {"weights": data} | ({"config": config} if config is not None else {})
    answers = [server.ask("POST", path, files=form)]
    if config is None:
        answers.append(server.ask("POST", path, content=data))
    coded = {f"file:{name}": base64.b64encode(own).decode() for name, own in files.items()}
    answers.append(server.ask("POST", load_path, json={"parameters": coded}))
    found = [(one.status_code, one.json().get("error", "")) for one in answers]
    told = server.call("RepositoryModelLoad", load_message("odd", {f"file:{name}": own for name, own in files.items()}))
    return [*found, ({"OK": 200, "INVALID_ARGUMENT": 400}.get(told.status, 500), told.text)]


class Runs:
    """Says that it was unpickled by making a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.place}",)


def zipped(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def saved(value: object, **how: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **how)
    return stream.getvalue()


def test_incident_3_nothing_but_safetensors_is_taken(server: Audited, others: list[Adapter], tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    good = others[1].to_bytes()
    runs = pickle.dumps(Runs(mark))
    weights = {name: torch.from_numpy(delta.dense()) for name, delta in others[1].deltas.items()}
    header = int.from_bytes(good[:8], "little")
    files = {
        "a pickle": runs,
        "each protocol of them": pickle.dumps(Runs(mark), 0),
        "torch's files": saved({"weights": weights, "runs": Runs(mark)}),
        "torch's older files": saved({"runs": Runs(mark)}, _use_new_zipfile_serialization=False),
        "torch's weights only": saved(weights),
        "numpy's objects": npy(np.array([Runs(mark)], object)),
        "an archive": zipped(**{"../../x": runs, "data.pkl": runs}),
        "safetensors in an archive": zipped(**{"adapter_model.safetensors": good}),
        "an archive behind safetensors": good + zipped(x=runs),
        "a pickle behind safetensors": good + runs,
        "a pickle before safetensors": runs + good,
        "safetensors that end early": good[:-1],
        "a header that is longer than the file": (1 << 62).to_bytes(8, "little") + good[8:],
        "a header that is no JSON": good[:8] + b"(" * header + good[8 + header :],
        "YAML": f"!!python/object/apply:os.system ['touch {mark}']".encode(),
        "a script": f"#!/bin/sh\ntouch {mark}\n".encode(),
        "nothing": b"",
    }
    before = tree(server.place)
    for what, data in files.items():
        for status, text in every_way(server, data):
            assert status == 400, (what, text)
    for name in ("adapter_model.bin", "pytorch_model.bin", "model.pt", "adapter.pkl", "x.safetensors.pkl"):
        coded = {f"file:{name}": base64.b64encode(good).decode()}
        assert server.ask("POST", "/v2/repository/models/odd/load", json={"parameters": coded}).status_code == 400
        assert server.ask("POST", "/v2/registry/tasks/odd/versions", files={name: good}).status_code == 400
    check_unchanged(server, others, before)
    assert not mark.exists()
    assert server.ran_nothing()
    pickle.loads(runs)
    assert mark.exists(), "these would have run"


def npy(array: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def test_incident_12_no_graph_is_taken(server: Audited, others: list[Adapter]) -> None:
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    weight.data_location = onnx.TensorProto.EXTERNAL
    before = tree(server.place)
    for location in ("../../../../etc/passwd", "/etc/passwd", "adapter_model.safetensors", "..\\x"):
        del weight.external_data[:]
        weight.external_data.add(key="location", value=location)
        output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])
        node = onnx.helper.make_node("Identity", ["w"], ["y"])
        graph = onnx.helper.make_graph([node], "g", [], [output], [weight])
        data = onnx.helper.make_model(graph).SerializeToString()
        for config in (None, b"{}", json.dumps({"location": location}).encode()):
            assert {status for status, _ in every_way(server, data, config)} == {400}
        for name in ("model.onnx", "1/model.onnx", "model.onnx.data", "config.pbtxt"):
            coded = {f"file:{name}": base64.b64encode(data).decode(), "config": json.dumps({"backend": "onnxruntime"})}
            answer = server.ask("POST", "/v2/repository/models/odd/load", json={"parameters": coded})
            assert answer.status_code == 501
            told = server.call("RepositoryModelLoad", load_message("odd", {f"file:{name}": data}))
            assert told.status == "INVALID_ARGUMENT"
    check_unchanged(server, others, before)
    assert not [path for _, path, _ in server.did("open") if "passwd" in path]


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up"], "fan_in_fan_out": False, "bias": "none"}


def lora(**more: Array) -> bytes:
    random = np.random.default_rng(5)
    down, up = random.standard_normal((2, 8)), random.standard_normal((16, 2))
    return save({
        "base_model.model.up.lora_A.weight": down.astype(np.float32),
        "base_model.model.up.lora_B.weight": up.astype(np.float32),
        **more,
    })  # fmt: skip


def test_incident_5_a_configuration_fetches_and_imports_nothing(server: Audited) -> None:
    """Whether it is refused or what it says is of no account: nobody is asked, and nothing else is computed."""
    plain = server.ask("POST", "/v2/registry/tasks/lora/versions", files=form(LORA))
    digest = plain.json()["versions"][0]["digest"]
    expected = logits(ask(server, "lora"), digest)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/evil"
        hostile: list[dict[str, Any]] = [
            {"base_model_name_or_path": url, "revision": "main"},
            {"base_model_name_or_path": "somebody/evil", "trust_remote_code": True},
            {"base_model_name_or_path": "../../../../etc", "tokenizer_name": url},
            {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}, "trust_remote_code": True},
            {"auto_map": {"AutoModel": "somebody/evil--modeling.Evil"}, "trust_remote_code": True},
            {"custom_class": "os.system", "_target_": "os.system", "__reduce__": ["os.system", "true"]},
            {"megatron_config": {}, "megatron_core": "evil.core"},
            {"runtime_config": {"ephemeral_gpu_offload": True}, "loftq_config": {"path": url}},
            {"peft_type": "../../evil"},
            {"peft_type": "XLORA", "adapters": {"0": url, "1": "/etc/passwd"}},
            {"peft_type": {"__class__": "evil"}},
            {"target_modules": ".*(a+)+$"},
            {"init_lora_weights": url},
            {"modules_to_save": ["../../etc/passwd"]},
        ]
        taken = 0
        for own in hostile:
            answer = server.ask("POST", "/v2/registry/tasks/lora/versions", files=form(LORA | own))
            assert answer.status_code in {200, 400}, (own, answer.text)
            if answer.status_code == 200:
                taken += 1
                (version,) = answer.json()["aliases"].values()
                assert answer.json()["versions"][-1]["digest"] == digest
                np.testing.assert_array_equal(logits(ask(server, "lora"), digest, version), expected)
        assert taken > 3, "what PEFT writes of itself is no reason to refuse an adapter"
        for name in ("somebody/evil", url, "hf://somebody/evil"):
            config = json.dumps({"parameters": {"model": name}})
            for parameters in ({"repo_id": name}, {"config": config}, {"file:": name}):
                path = "/v2/repository/models/lora/load"
                status = server.ask("POST", path, json={"parameters": parameters}).status_code
                assert status in {400, 501}, parameters
        with pytest.raises(TimeoutError):
            listener.accept()
    assert server.ran_nothing()
    assert server.ask("DELETE", "/v2/registry/tasks/lora").status_code == 200


def form(config: dict[str, Any], data: bytes | None = None) -> dict[str, bytes]:
    return {"weights": lora() if data is None else data, "config": json.dumps(config).encode()}


def misfits() -> dict[str, dict[str, bytes]]:
    """Adapters that would change nothing, or only a part of what they say, or another model."""
    module = nets.conv_net()[0]
    right = nets.adapter_for(module, {"up.weight": (2, 2)}, seed=7)
    (delta,) = right.deltas.values()
    digests = right.base_digests
    zero = TuckerDelta(np.zeros_like(delta.core), delta.factors, 1.0)
    nan = np.full_like(delta.core, np.nan)
    small = TuckerDelta(delta.core * np.float32(1e-30), delta.factors, 1.0)
    wide = nets.delta((16, 9), (2, 2), 1)
    bias = dict(module.named_parameters())["head.bias"].detach().numpy()
    own: dict[str, Adapter] = {
        "no target of its own": Adapter({"down.weight": delta}, {}, {}),
        "one target that there is and one that there is not": Adapter({"up.weight": delta, "x.weight": delta}, {}, {}),
        "a weight without a branch": nets.adapter_for(module, {"head.weight": (2, 2)}, seed=7),
        "another shape": Adapter({"up.weight": wide}, {}, {}),
        "another base": Adapter({"up.weight": delta}, {}, {"up.weight": "0" * 64}),
        "no change": Adapter({"up.weight": zero}, {}, digests),
        "a change that is too small to be seen": Adapter({"up.weight": small}, {}, digests),
        "a scale of zero": Adapter({"up.weight": TuckerDelta(delta.core, delta.factors, 0.0)}, {}, digests),
        "the base's own bias": Adapter({}, {"head.bias": bias}, {}),
    }
    files = {what: {"weights": one.to_bytes()} for what, one in own.items()}
    zeros = {"base_model.model.up.lora_B.weight": np.zeros((16, 2), np.float32)}
    return files | {
        "numbers that are none": {"weights": forged({"delta/up.weight/core": nan}, right)},
        "a tensor that belongs to nothing": {"weights": forged({"delta/none.weight/core": delta.core}, right)},
        "LoRA of a module that there is not": form(LORA | {"target_modules": ["none"]}, renamed("up", "none")),
        "LoRA as it is before training": form(LORA, lora(**zeros)),
        "LoRA with a tensor beside": form(LORA, lora(**{"base_model.model.none.lora_A.weight": zeros.popitem()[1]})),
    }


def forged(tensors: dict[str, Array], adapter: Adapter) -> bytes:
    """A canonical file with tensors that no adapter would be written with."""
    data = adapter.to_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    own = {name: np.frombuffer(data[8 + size :][slice(*one["data_offsets"])], np.float32).reshape(one["shape"])
           for name, one in header.items()}  # fmt: skip
    return save(own | tensors, metadata)


def renamed(old: str, new: str) -> bytes:
    size = int.from_bytes(lora()[:8], "little")
    header = lora()[8 : 8 + size].replace(f".{old}.".encode(), f".{new}.".encode())
    return len(header).to_bytes(8, "little") + header + lora()[8 + size :]


def test_incident_10_what_does_not_bind_is_refused(server: Audited, others: list[Adapter]) -> None:
    before = tree(server.place)
    for what, files in misfits().items():
        for name in ("odd", "mood"):
            answer = server.ask("POST", f"/v2/registry/tasks/{name}/versions", files=files)
            assert answer.status_code == 400, (what, answer.text)
        assert server.ask("GET", "/v2/registry/tasks/mood").json()["aliases"] == {"current": "1"}
        check_unchanged(server, others, before)


def test_incident_10_an_answer_names_what_answered(server: Audited, others: list[Adapter]) -> None:
    digest = digest_of(others[0])
    base = np.array(ask(server, "base").json()["outputs"][0]["data"], np.float32).reshape(4, 10)
    with torch.no_grad():
        close(base, np.asarray(nets.conv_net()[0](torch.from_numpy(PIXELS))["logits"]))
    assert not np.allclose(base, merged(others[0]), atol=1e-3)
    names = {"name": "adapter", "shape": [4], "datatype": "BYTES", "data": ["mood", "base", "mood@1", "base"]}
    mixed = server.ask("POST", "/v2/models/conv/infer", json={"inputs": [tensor(), names]}).json()
    assert mixed["parameters"] == {"adapter_digest": f"{digest},base,{digest},base"}
    found = np.array(mixed["outputs"][0]["data"], np.float32).reshape(4, 10)
    close(found, np.where([[True], [False], [True], [False]], merged(others[0]), base))
    # The bundle's own name is no other word for its base.
    assert ask(server, "conv").status_code == 400
    for name in ("nothing", "mood@2"):
        named = {"inputs": [tensor()], "parameters": {"adapter": name}}
        assert server.ask("POST", "/v2/models/conv/infer", json=named).status_code == 404
    for model, expected in (("mood", merged(others[0])), ("base", base)):
        told = pb.ModelInferResponse.FromString(server.call("ModelInfer", infer_message(model)).answers[0])
        assert told.parameters["adapter_digest"].string_param == (digest if model == "mood" else "base")
        close(np.frombuffer(told.raw_output_contents[0], np.float32).reshape(4, 10), expected)


def test_incident_15_the_digest_is_that_of_the_content(server: Audited, others: list[Adapter]) -> None:
    registered = [server.register(one, "told").json()["versions"][-1] for one in others]
    shown = server.ask("GET", "/v2/registry/tasks/told").json()["versions"]
    openai = {one["id"]: one["root"] for one in server.ask("GET", "/v1/models").json()["data"]}
    audit = server.ask("GET", "/v2/admin/audit?limit=3", "operator", "admin").json()
    for number, adapter in enumerate(others):
        digest = digest_of(adapter)
        stored = (server.state / "blobs" / digest[:2] / f"{digest}.safetensors").read_bytes()
        assert stored == adapter.to_bytes()
        assert registered[number]["digest"] == shown[number]["digest"] == digest
        assert audit[-1 - number]["detail"]["digest"] == digest
        path = f"/v2/models/told/versions/{number + 1}/infer"
        answer = server.ask("POST", path, json={"inputs": [tensor()]})
        close(logits(answer, digest, str(number + 1)), merged(adapter))
    assert openai["told"] == digest_of(others[2])
    assert server.ask("DELETE", "/v2/registry/tasks/told").status_code == 200
