"""Adapters of other libraries, all the way: trained side's file -> bundle -> one mixed batch, against their forward."""

from __future__ import annotations

from pathlib import Path

import lycoris
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import nets
from tpeft_deploy import Runtime, export_bundle, export_folded, load_adapter

TARGETS = ["stem", "up", "head"]


def randomise(parameters: object) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:  # type: ignore[attr-defined]
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def peft_answers(place: Path, config: peft.PeftConfig, pixels: torch.Tensor) -> np.ndarray:
    model = peft.get_peft_model(nets.conv_net()[0], config)
    randomise(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.eval().save_pretrained(str(place))
    with torch.no_grad():
        answers: np.ndarray = model(pixels=pixels)["logits"].numpy()
    return answers


def locon_answers(place: Path, pixels: torch.Tensor) -> np.ndarray:
    module = nets.conv_net()[0]
    network = lycoris.create_lycoris(module, 1.0, linear_dim=3, linear_alpha=2, algo="locon", use_tucker=True)
    randomise(p for name, p in network.named_parameters() if "alpha" not in name)
    network.apply_to()
    place.mkdir()
    state = {k: v.contiguous() for k, v in network.state_dict().items() if not k.startswith("loras.")}
    save_file(state, place / "locon.safetensors")
    with torch.no_grad():
        answers: np.ndarray = module.eval()(pixels)["logits"].numpy()
    return answers


def test_adapters_of_three_libraries_share_one_batch(tmp_path: Path) -> None:
    module, inputs = nets.conv_net()
    pixels = torch.randn(4, 1, 12, 14, generator=torch.Generator().manual_seed(5))
    lora = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, use_rslora=True)
    loha = peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS)
    expected = {
        "lora": peft_answers(tmp_path / "lora", lora, pixels),
        "loha": peft_answers(tmp_path / "loha", loha, pixels),
        "locon": locon_answers(tmp_path / "locon", pixels),
    }
    files = {"lora": tmp_path / "lora", "loha": tmp_path / "loha", "locon": tmp_path / "locon" / "locon.safetensors"}
    adapters = {task: load_adapter(file, base=module) for task, file in files.items()}
    first = {task: adapters[task] for task in ("lora", "locon")}
    bundle = export_bundle(module, first, tmp_path / "bundle", example_inputs=inputs)
    runtime = Runtime(bundle.path, provider="cpu")
    runtime.load("loha", files["loha"])  # resolved against the bundle's own weights, without torch
    tasks = ["loha", "locon", "lora", "loha"]
    answers = runtime.run({"pixels": pixels.numpy()}, tasks=tasks)["logits"]
    for row, task in enumerate(tasks):
        reference = expected[task][row]
        assert np.linalg.norm(answers[row] - reference) <= 2e-5 * np.linalg.norm(reference), task


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_gains_are_exact_in_every_form_and_in_mixed_rows(tmp_path: Path, method: str) -> None:
    import onnxruntime

    module, inputs = nets.conv_net()
    config = {
        "dora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, use_dora=True),
        "ia3": peft.IA3Config(target_modules=["stem", "up"], feedforward_modules=["up"]),
    }[method]
    expected = peft_answers(tmp_path / "gains", config, inputs["pixels"])
    adapter = load_adapter(tmp_path / "gains", base=module)
    assert adapter.gains
    export_folded(module, adapter, tmp_path / "m.onnx", example_inputs=inputs)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"pixels": inputs["pixels"].numpy()})
    assert np.linalg.norm(got - expected) <= 2e-5 * np.linalg.norm(expected)

    plain = nets.conv_adapters(module)["plain"]
    bundle = export_bundle(module, {"gains": adapter, "plain": plain}, tmp_path / "bundle", example_inputs=inputs)
    assert bundle.manifest.rows == "each"
    runtime = Runtime(bundle.path, provider="cpu")
    pixels = {"pixels": inputs["pixels"].numpy()[[0, 0, 0, 1]]}
    mixed = runtime.run(pixels, tasks=["gains", "base", "plain", "gains"])["logits"]
    for row, own in ((0, 0), (3, 1)):
        assert np.linalg.norm(mixed[row] - expected[own]) <= 2e-5 * np.linalg.norm(expected[own])
    base = runtime.run(pixels)["logits"]
    np.testing.assert_allclose(mixed[1], base[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_lycoris_on_one_use_of_a_tied_weight(tmp_path: Path, algo: str) -> None:
    module, inputs = nets.text_net()
    lycoris.LycorisNetwork.apply_preset({"target_name": ["out"]})
    network = lycoris.create_lycoris(module, 1.0, linear_dim=4, linear_alpha=2, algo=algo)
    network.apply_to()
    randomise(network.parameters())
    save_file(network.state_dict(), tmp_path / "out.safetensors")
    with torch.no_grad():
        expected = module(**inputs).numpy()
    module, _ = nets.text_net()
    adapter = load_adapter(tmp_path / "out.safetensors", base=module)
    bundle = export_bundle(module, {"out": adapter}, tmp_path / "bundle", example_inputs=inputs)
    (got,) = Runtime(bundle.path, provider="cpu").run({k: v.numpy() for k, v in inputs.items()}, task="out").values()
    assert np.linalg.norm(got - expected) <= 2e-5 * np.linalg.norm(expected)
