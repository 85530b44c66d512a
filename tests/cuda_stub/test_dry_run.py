"""What ONNX Runtime's real CUDA provider makes of our graphs, on a CUDA that computes nothing (`make cuda-dry-run`).

Placement, copies, launches and recordings are real. Answers and times are not: nothing here may quote one.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from benchmarks import gpu_models
from tests.cuda_stub.child import STUB, run_child
from tests.helpers.exporters import architectures as zoo
from tests.helpers.exporters import small_encoder_decoders as encoder_decoders
from tests.helpers.exporters.layers import CASES
from tests.helpers.exporters.matrix import adapters_of
from tests.helpers.exporters.small_decoders import made, trained
from tpeft_deploy import export_bundle, load_adapter

pytestmark = pytest.mark.cuda_stub

FORMS = ("base", "factored", "banked one", "banked each")


# Launches, at most, of a run of four rows: the base's, with factors, with one bank row, with a bank row each.
LAUNCHES = {
    "ConvNeXt-V2": (118, 171, 226, 226),
    "ViT": (64, 90, 115, 115),
    "DINOv2": (73, 97, 120, 120),
    "BERT": (73, 97, 118, 118),
    "DeBERTa-V2": (115, 153, 216, 212),
    "DeBERTa-V3": (104, 164, 199, 195),
    "Llama with KV cache": (136, 184, 203, 203),
    "Llama, tied": (136, 181, 199, 199),
    "ResNet with BatchNorm": (31, 104, 139, 139),
    "MultiheadAttention encoder": (53, 77, 97, 101),
    "Conv1d net": (8, 19, 32, 32),
    "Conv3d net": (9, 18, 29, 29),
    "U-Net with cross-attention": (87, 156, 224, 224),
    "llama": (44, 56, 63, 63),
    "qwen3": (46, 52, 56, 56),
    "encoder": (165, 225, 255, 255),
}


CHOICE_LAUNCHES = 12


def on_stub(*command: str, log: Path) -> subprocess.CompletedProcess[str]:
    if not (STUB / "libcudnn.so.9").is_file():
        pytest.fail(f"no CUDA stub in {STUB}: run `make cuda-dry-run`")
    done = run_child(*command, CUDA_STUB_LOG=str(log))
    assert not done.returncode, done.stderr[-2000:]
    return done


def surveyed(bundle: Path, place: Path, *component: str) -> dict[str, dict[str, Any]]:
    """What `on_stub` finds of each form, and the copies in the optimised graphs."""
    place.mkdir()
    found: dict[str, dict[str, Any]] = json.loads(
        on_stub("tests.cuda_stub.on_stub", str(bundle), str(place), *component, log=place / "log").stdout.splitlines()[
            -1
        ]
    )
    for form, facts in found.items():
        facts["copies"] = copies(onnx.load(place / f"{form}.onnx", load_external_data=False).graph)
    return found


def copies(graph: onnx.GraphProto) -> list[str]:
    """Each copy between CUDA and the CPU, by the operators around it."""
    made = {output: node for node in graph.node for output in node.output}
    found = []
    for node in graph.node:
        if node.op_type.startswith("Memcpy"):
            source = made[node.input[0]].op_type if node.input[0] in made else "input"
            readers = sorted({other.op_type for other in graph.node if node.output[0] in other.input})
            found.append(f"{source} > {'+'.join(readers)}")
    return found


def test_launches_of_one_adapter(tmp_path: Path) -> None:
    """An adapter of all linear layers of a six-layer encoder: at most 1.4 of the base's launches.

    No product takes its matrices by pointers from the host, whether one adapter runs or one for each row.
    """
    bundle = gpu_models.encoder(tmp_path / "encoder", layers=6, width=128)
    found = surveyed(bundle.path, tmp_path / "found")
    obey(found)
    assert excess("encoder", found) == {}
    assert found["factored"]["calls"]["launches"] <= 1.4 * found["base"]["calls"]["launches"]
    assert {form: facts["calls"]["pointer arrays"] for form, facts in found.items()} == dict.fromkeys(FORMS, 0)


def test_recording_among_others(tmp_path: Path) -> None:
    models, out, log = tmp_path / "models", tmp_path / "out", tmp_path / "log"
    gpu_models.encoder(models / "encoder", layers=2, width=128)
    on_stub(
        "benchmarks.gpu", "run", str(models), "--out", str(out), "--seconds", "0", "--only", "recording among others",
        log=log,
    )  # fmt: skip
    (check,) = json.loads((out / "gpu.json").read_text())["checks"].values()
    assert check["status"] == "done"
    assert {claim["claim"]: claim["holds"] for claim in check["claims"]} == {
        "shapes recorded, of 16": True,
        "failures while recording": True,
    }
    calls = Counter(line.split("\t")[0] for line in log.read_text().splitlines())
    assert calls["spoilt by"] == 0


def test_the_second_device_holds_all(tmp_path: Path) -> None:
    module, inputs, shapes = zoo.MODELS["Conv1d net"]()
    adapters = zoo.adapters_for(module)
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs, dynamic_shapes=shapes)
    log = tmp_path / "log"
    said = on_stub("tests.cuda_stub.on_second_device", str(bundle.path), log=log).stdout
    assert "expected a working CUDA device 2, got no tensor could be placed on device 2" in said
    calls = Counter(line.split("\t")[0] for line in log.read_text().splitlines())
    assert calls["cudaMalloc"] == calls["cudaMalloc on device"] > 0
    assert calls["spoilt by"] == 0


def test_two_devices_of_one_runtime_hold_and_copy_the_same(tmp_path: Path) -> None:
    module, inputs, shapes = zoo.MODELS["Conv1d net"]()
    adapters = zoo.adapters_for(module)
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs, dynamic_shapes=shapes)
    log = tmp_path / "log"
    found = json.loads(on_stub("tests.cuda_stub.on_two_devices", str(bundle.path), log=log).stdout.splitlines()[-1])
    assert "expected a working CUDA device 2, got no tensor could be placed on device 2" in found["third"]
    assert found["rows"] == 2 * [len(adapters)]
    first, second = found["copied"]
    # What a run on one device copies: its inputs and outputs, and nothing of a bank.
    assert first == second == found["alone"]
    calls = Counter(line.split("\t")[0] for line in log.read_text().splitlines())
    assert 0 < calls["cudaMalloc on device"] < calls["cudaMalloc"]


ZOO = [pytest.param(name, torch.float32, id=f"{name}-float32") for name in zoo.MODELS]
ZOO += [pytest.param(name, torch.float16, id=f"{name}-float16") for name in zoo.HALF]


@pytest.mark.parametrize(("name", "dtype"), ZOO)
def test_an_architecture(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    module, inputs, shapes = zoo.MODELS[name]()
    adapters = zoo.adapters_for(module)
    module = module.to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs, dynamic_shapes=shapes)
    found = surveyed(bundle.path, tmp_path / "found")
    obey(found)
    assert excess(name, found) == {}
    # The bank adds no product for one adapter that takes its matrices by pointers from the host.
    assert found["banked one"]["calls"]["pointer arrays"] <= found["factored"]["calls"]["pointer arrays"]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_decoder(tmp_path: Path, name: str) -> None:
    paths, model = trained(name, tmp_path), made(name)
    adapters = {task: load_adapter(path, base=model) for task, path in paths.items()}
    bundle = export_bundle(model.half(), adapters, tmp_path / "bundle", generation=True)
    forms = surveyed(bundle.path, tmp_path / "found")
    obey(forms)
    assert excess(name, forms) == {}
    assert [form for form, facts in forms.items() if "GroupQueryAttention" in facts["on cpu"]] == []
    said = on_stub("tests.cuda_stub.decoder_on_stub", str(bundle.path), log=tmp_path / "log").stdout
    found = json.loads(said.splitlines()[-1])
    assert found["lengths"] == [6]
    assert found["reused"] > 0
    assert found["recorded"] == 2 * [{"graph launch": 1}]
    ports = bundle.manifest.decoder
    assert ports is not None
    for call, numbers in (("prefill", 7 + 1 + 1), ("decode", 3 * 3)):  # tokens, pasts and bank rows
        calls = found["calls"][call]
        assert calls["launches"] <= LAUNCHES[name][-1]
        assert calls["HostToDevice bytes"] == numbers * 8
        assert "DeviceToHost" not in calls  # the logits stay
        assert calls["DeviceToDevice bytes"] < found["block"]  # of activations; a row's caches are several blocks
    assert found["choice on cpu"] == []
    chosen, whole = found["calls"]["choose"], found["calls"]["whole"]
    assert (chosen["DeviceToHost"], chosen["DeviceToHost bytes"]) == (3, 3 * (found["kept"] * (4 + 8) + 8))
    assert chosen["HostToDevice bytes"] == 3 * 4  # temperatures
    assert chosen["launches"] <= CHOICE_LAUNCHES
    assert whole["DeviceToHost bytes"] == 3 * ports.vocabulary * 2
    size = found["block"]
    assert {name: found["calls"][name] for name in ("save", "restore", "move")} == {
        "save": {"DeviceToHost": 4, "DeviceToHost bytes": size},
        "restore": {"HostToDevice": 4, "HostToDevice bytes": size},
        "move": {"DeviceToDevice": 4, "DeviceToDevice bytes": size},
    }


@pytest.mark.parametrize(("name", "dtype"), [("t5", torch.float32), ("whisper", torch.float16)])
def test_a_decoder_with_memory(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    paths, model = encoder_decoders.trained(name, tmp_path), encoder_decoders.made(name)
    adapters = {task: load_adapter(path, base=model) for task, path in paths.items()}
    model.to(dtype).save_pretrained(tmp_path / "model")
    bundle = export_bundle(tmp_path / "model", adapters, tmp_path / "bundle", generation=True)
    for component in bundle.components:
        obey(surveyed(bundle.path, tmp_path / component, component))


LAYERS = [(name, change) for name, case in CASES.items() for change in ("delta", "override")]
LAYERS = [(name, change) for name, change in LAYERS if change == "delta" or CASES[name].overrides]


@pytest.mark.parametrize(("name", "change"), LAYERS)
def test_a_layer(tmp_path: Path, name: str, change: str) -> None:
    case = CASES[name]
    module, inputs = case.build(torch.float32)
    shapes = {key: {0: "batch"} | case.free.get(key, {}) for key in inputs}
    adapters = adapters_of(case, module, change)
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs, dynamic_shapes=shapes)
    obey(surveyed(bundle.path, tmp_path / "found"))


def excess(name: str, found: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Launches of the forms that have more than they may."""
    launches = {form: facts["calls"]["launches"] for form, facts in found.items()}
    return {form: count for form, count in launches.items() if count > LAUNCHES[name][FORMS.index(form)]}


def obey(found: Mapping[str, Mapping[str, Any]]) -> None:
    """All forms run on CUDA alone and can be recorded: no control flow, and no copy in the middle of a run."""
    assert {form: (facts["not recordable"], facts["copies"]) for form, facts in found.items()} == dict.fromkeys(
        found, ("", [])
    )
    assert [form for form, facts in found.items() if facts["calls"].get("DeviceToHost")] == []
