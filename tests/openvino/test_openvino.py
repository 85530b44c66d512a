"""The runtime with onnxruntime-openvino, in an environment apart (`make openvino`), against the CPU provider."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.exporters import architectures as zoo
from tests.helpers.exporters.small_decoders import made, trained
from tpeft_deploy import Bundle, Runtime, export_bundle, load_adapter
from tpeft_deploy.runtime.folding.compare import agree, limit_of

pytestmark = pytest.mark.openvino

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("OPENVINO", ROOT / ".venv-openvino")).resolve()


def on_openvino(program: str, *command: str) -> subprocess.CompletedProcess[str]:
    installed = ENVIRONMENT / "bin" / program
    if not installed.is_file():
        pytest.fail(f"no environment in {ENVIRONMENT}: run `make openvino`")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [str(installed), *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def answer(*command: str) -> dict[str, Any]:
    done = on_openvino("python", "-m", "tests.helpers.on_openvino", *command)
    assert not done.returncode, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def exported(name: str, place: Path, dtype: torch.dtype = torch.float32) -> Bundle:
    module, inputs, shapes = zoo.MODELS[name]()
    adapters = zoo.adapters_for(module)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    return export_bundle(module.to(dtype), adapters, place, example_inputs=inputs, dynamic_shapes=shapes)


def compare(bundle: Bundle, place: Path, requests: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """What `on_openvino` says of requests; those that it answers are compared with the CPU provider."""
    place.mkdir()
    for name, (inputs, asked) in requests.items():
        np.savez(place / f"{name}.npz", **inputs)
        (place / f"{name}.json").write_text(json.dumps(asked))
    found = answer("run", str(bundle.path), str(place))
    assert found["provider"] == "openvino"
    limit = limit_of(bundle.manifest)
    with Runtime(bundle.path, provider="cpu") as runtime:
        for name in requests.keys() - found["errors"].keys():
            inputs, asked = requests[name]
            asked = {key: value for key, value in asked.items() if key != "fold"}
            outputs: dict[str, Any] = runtime.run(inputs, **asked)
            whole = {n: np.concatenate(v) if isinstance(v, list) else v for n, v in outputs.items()}
            assert agree(dict(np.load(place / f"{name}.out.npz")), whole) <= limit, name
            assert found[name] <= limit, f"{name}: two threads disturb each other"
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_encoder_is_served_in_all_forms(tmp_path: Path, dtype: torch.dtype) -> None:
    bundle = exported("BERT", tmp_path / "bundle", dtype)
    ids = np.random.default_rng(0).integers(3, 40, (5, 11))
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert set(inputs) == {port.name for port in bundle.manifest.inputs}
    found = compare(
        bundle,
        tmp_path / "requests",
        {
            "1": (inputs, {}),
            "2": (inputs, {"task": "rank2"}),
            "3": (inputs, {"tasks": ["rank2", "rank3", "base", "rank3", "rank2"]}),
            "4": (inputs, {"task": "rank3", "fold": ["rank3"]}),
        },
    )
    assert found["errors"] == {}
    assert found["reason"] == "OpenVINO was asked for"


def test_a_model_with_convolutions_is_served_folded(tmp_path: Path) -> None:
    """OpenVINO takes no convolution with a weight that is computed, as a bank's are."""
    bundle = exported("Conv1d net", tmp_path / "bundle")
    inputs = bundle.example()
    rows = max(len(array) for array in inputs.values())
    found = compare(
        bundle,
        tmp_path / "requests",
        {
            "1": (inputs, {}),
            "2": (inputs, {"task": "rank2"}),
            "3": (inputs, {"task": "rank3", "fold": ["rank3"]}),
            "4": (inputs, {"tasks": ["rank3", *["base"] * (rows - 1)]}),
        },
    )
    assert set(found["errors"]) == {"2"}
    assert "run task 'rank2' of bundle" in found["errors"]["2"]
    assert "expected a task with a folded session, got banked.onnx not used (Unsupp" in found["errors"]["2"]
    assert "; banked.onnx not used (Unsupported operation of type: GroupConvolution" in found["reason"]


def test_a_model_that_openvino_computes_wrongly_is_refused(tmp_path: Path) -> None:
    bundle = exported("Llama, tied", tmp_path / "bundle")
    (tmp_path / "requests").mkdir()
    refusal = answer("run", str(bundle.path), str(tmp_path / "requests"))["refused"]
    assert refusal.startswith(
        f"ProviderUnavailable: open bundle {bundle.manifest.name!r} on OpenVINO: expected the exam"
    )


def test_a_decoder_is_refused(tmp_path: Path) -> None:
    paths, model = trained("llama", tmp_path), made("llama")
    adapters = {task: load_adapter(path, base=model) for task, path in paths.items()}
    bundle = export_bundle(model, adapters, tmp_path / "bundle", generation=True)
    (tmp_path / "requests").mkdir()
    refusal = answer("run", str(bundle.path), str(tmp_path / "requests"))["refused"]
    assert "with a decoder, on OpenVINO: expected a provider that updates the decoder's caches in place" in refusal


def test_sessions_are_exact_or_refused(conv_bundle: Bundle) -> None:
    found = answer("sessions", str(conv_bundle.path))
    assert found["exact"] < 1e-6
    assert found["auto"] == "cpu"
    refused = found["refused"]
    assert "open factored.onnx on OpenVINO: expected a graph whose inputs are all fed, got" in refused["factored"]
    assert "with CUDA graphs: expected the CUDA provider" in refused["cuda graphs"]
    assert "built without CUDA" in refused["cuda"]
    assert "built without TensorRT" in refused["tensorrt"]


def test_the_command_line_folds_where_the_bank_is_refused(conv_bundle: Bundle, tmp_path: Path) -> None:
    given, out = tmp_path / "in.npz", tmp_path / "out.npz"
    np.savez(given, **conv_bundle.example())  # type: ignore[arg-type]
    files = ["--input", str(given), "--output", str(out)]
    done = on_openvino("tpeft-deploy", "run", str(conv_bundle.path), *files, "--task", "two", "--provider", "openvino")
    assert not done.returncode, done.stderr
    assert "provider: openvino (OpenVINO was asked for; banked.onnx not used" in done.stderr
    with Runtime(conv_bundle.path, provider="cpu") as runtime:
        assert agree(dict(np.load(out)), runtime.run(conv_bundle.example(), "two")) < 1e-5


def test_a_benchmark_says_what_it_left_out(tmp_path: Path) -> None:
    bundle = exported("BERT", tmp_path / "bundle")
    options = ["--rows", "2", "--seconds", "0.1", "--provider", "openvino", "--json"]
    done = on_openvino("tpeft-deploy", "bench", str(bundle.path), *options)
    assert not done.returncode, done.stderr
    document = json.loads(done.stdout)
    assert {case["case"] for case in document["cases"]} >= {"plain", "base", "folded", "banked", "mixed"}
    assert "factored" in {entry["what"] for entry in document["left_out"]}
