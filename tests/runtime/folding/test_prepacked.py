"""Folded sessions on packed copies of a base: their answers, and the operators that they run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.helpers.exporters.architectures import deberta_v3
from tests.helpers.exporters.matrix import error, feeds
from tpeft_deploy import export_bundle, load_adapter
from tpeft_deploy.runtime.folding import merge
from tpeft_deploy.runtime.folding.prepacked import packed_copy
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.providers import Choice
from tpeft_deploy.tucker import Array


def operators(
    model: Path, sessions: SessionFactory, place: Path, changed: dict[str, Array] | None = None
) -> Counter[str]:
    """The operators of a session, counted in the graph that it runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(place / "optimised.onnx")
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in (changed or {}).items()}
    sessions.open(model, initializers=values, options=options)
    return Counter(node.op_type for node in onnx.load(place / "optimised.onnx", load_external_data=False).graph.node)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_positions_that_an_adapter_changes_are_projected_once_per_session(tmp_path: Path) -> None:
    module, inputs, shapes = deberta_v3()
    # share_att_key: queries and keys project the relative positions too, which no input of the model changes.
    settings = LoraConfig(r=3, target_modules=["query_proj", "key_proj", "value_proj"], init_lora_weights=False)
    tuned = get_peft_model(module, settings).eval()
    with torch.no_grad():
        expected = tuned(**inputs).logits.numpy()
    tuned.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    bundle = export_bundle(
        tuned.unload(), {"task": adapter}, tmp_path / "bundle", example_inputs=inputs, dynamic_shapes=shapes
    )
    sessions = SessionFactory.of(bundle.manifest, Choice("cpu", "a test"), threads=1)
    folded = merge.fold(bundle, adapter, sessions, place=tmp_path)
    assert error(folded.run(feeds(inputs))["logits"], expected) <= 1e-5

    changed = merge.weights(bundle, adapter)
    copy = packed_copy(bundle.path / "base.onnx", changed, tmp_path)
    base = operators(bundle.path / "base.onnx", sessions, tmp_path)
    on_copy = operators(copy, sessions, tmp_path, changed)
    assert on_copy.total() <= base.total()
    assert on_copy == base
