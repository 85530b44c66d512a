"""What only a CUDA device can show; `benchmarks/gpu.py` measures the same on a machine without pytest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers import nets
from tests.helpers.exporters import architectures
from tests.helpers.runtime.banks import all_tasks
from tpeft_deploy import Bundle, Runtime, export_bundle
from tpeft_deploy.errors import RunError
from tpeft_deploy.runtime.adapters import device_rows
from tpeft_deploy.runtime.sessions import providers
from tpeft_deploy.runtime.sessions.banked import Session
from tpeft_deploy.runtime.sessions.cuda_graph import Captured
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.providers import ORT_ERRORS, Cuda, open_session
from tpeft_deploy.runtime.sessions.shape_buckets import Buckets
from tpeft_deploy.tucker import Array

CHOICE = providers.choose("auto")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CHOICE.device != "cuda", reason=f"needs CUDA and onnxruntime-gpu: {CHOICE.reason}"),
]
CPU = providers.Choice("cpu", "a test")


def close(got: Array, expected: Array) -> None:
    assert got.shape == expected.shape
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


def images(rows: int, seed: int = 0) -> dict[str, Array]:
    return {"pixels": np.random.default_rng(seed).standard_normal((rows, 1, 12, 14)).astype(np.float32)}


def tokens(rows: int, length: int, seed: int = 0) -> dict[str, Array]:
    ids = np.random.default_rng(seed).integers(0, 50, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.fixture(scope="module")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    module, inputs, shapes = architectures.bert()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    adapters = {task: nets.adapter_for(module, {name: (2, 2)}, seed=seed) for seed, task in enumerate("ab")}
    path = tmp_path_factory.mktemp("bundles") / "bert"
    pads = dict.fromkeys(inputs, 0)
    return export_bundle(module, adapters, path, example_inputs=inputs, dynamic_shapes=shapes, padding=pads)


def test_mixed_and_single_rows_answer_as_on_the_cpu(conv_bundle: Bundle) -> None:
    cuda, cpu = (Runtime(conv_bundle.path, provider=device) for device in ("cuda", "cpu"))
    tasks = ["wide", "base", "two", "plain", "partial", "two"]
    for got, expected in zip(
        cuda.run(images(6), tasks=tasks)["logits"], cpu.run(images(6), tasks=tasks)["logits"], strict=True
    ):
        close(got, expected)
    for task in set(tasks):
        close(cuda.run(images(3), task)["logits"], cpu.run(images(3), task)["logits"])


def test_folded_answers_as_on_the_cpu(conv_bundle: Bundle) -> None:
    cuda, cpu = (Runtime(conv_bundle.path, provider=device) for device in ("cuda", "cpu"))
    cuda.pin("plain", folded=True)
    assert cuda.residency()["plain"] == "folded"
    close(cuda.run(images(3), "plain")["logits"], cpu.run(images(3), "plain")["logits"])


def test_a_row_is_written_on_the_device_and_no_other(conv_bundle: Bundle) -> None:
    before = np.random.default_rng(0).standard_normal((5, 3, 7)).astype(np.float32)
    bank = device_rows.allocate(before.shape, "float32", "cuda")
    device_rows.write(bank, before)
    for row in (0, 4):
        before[row] = row
        device_rows.write(device_rows.row_view(bank, row), before[row])
        np.testing.assert_array_equal(bank.numpy(), before)


def test_recorded_runs_answer_as_others(text_bundle: Bundle) -> None:
    model, manifest = text_bundle.path / "banked.onnx", text_bundle.manifest
    bank, rows = all_tasks(text_bundle, "cuda")
    other, _ = all_tasks(text_bundle, "cuda")
    on_cpu, _ = all_tasks(text_bundle)
    plain = Session(model, SessionFactory(CPU))
    recorded = Captured(model, SessionFactory(CHOICE), manifest, buckets=Buckets(manifest, max_rows=4, lengths=[8, 16]))
    for own in (bank, other, bank):
        for time in range(4):
            for count, length in ((1, 3), (3, 11), (4, 16)):
                inputs = tokens(count, length, seed=time)
                for index in (np.array([rows["b"]]), np.array([rows["a"], rows["b"], 0, rows["a"]][:count])):
                    close(recorded.run(own, inputs, index)["logits"], plain.run(on_cpu, inputs, index)["logits"])
    recorded.close()


def test_a_recorded_run_sees_a_row_that_was_written_since(text_bundle: Bundle) -> None:
    bank, rows = all_tasks(text_bundle, "cuda")
    recorded = Captured(text_bundle.path / "banked.onnx", SessionFactory(CHOICE), text_bundle.manifest)
    inputs = tokens(2, 6)
    for _ in range(4):
        recorded.run(bank, inputs, np.array([rows["a"]]))
    expected = recorded.run(bank, inputs, np.array([rows["b"]]))["logits"]
    bank.write(rows["a"], {name: value.numpy()[rows["b"]] for name, value in bank.values.items()})
    close(recorded.run(bank, inputs, np.array([rows["a"]]))["logits"], expected)
    recorded.close()


def test_grouped_convs_are_not_recorded_and_the_refusal_names_them(conv_bundle: Bundle) -> None:
    with pytest.raises(RunError, match=r"got Scan \w+GroupedConv"):
        Captured(conv_bundle.path / "banked.onnx", SessionFactory(CHOICE), conv_bundle.manifest)


def test_the_options_arrive(conv_bundle: Bundle) -> None:
    session = open_session(conv_bundle.path / "base.onnx", CHOICE, cuda=Cuda(memory_bytes=2**28))
    got = session.get_provider_options()["CUDAExecutionProvider"]
    assert {name: got[name] for name in Cuda(memory_bytes=2**28).options()} == Cuda(memory_bytes=2**28).options()


def test_the_memory_limit_is_kept(conv_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, *ORT_ERRORS), match=r"(?i)memory|alloc"):
        session = open_session(conv_bundle.path / "base.onnx", CHOICE, cuda=Cuda(memory_bytes=2**20))
        session.run(None, images(4096))
