"""An export is compared with the library that trained its adapter: what was misread is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lycoris
import onnx_ir as ir
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers import nets
from tests.helpers.exporters.hugging_face import TEXT, saved
from tpeft_deploy import Adapter, Bundle, export_bundle, export_folded, load_adapter, verify_bundle
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import FormatError, NotEquivalent, UnknownTask, UnsupportedBase
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.oracle.source import Sources
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.training import TuckerConfig

PEFT, LYCORIS = "peft 0.21.2", "lycoris 4.1.3"
TARGETS = ["conv", "up"]


class Net(nn.Module):
    """A convolution, a norm, a linear layer and a head."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.Linear(6, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.tanh(self.up(self.norm(self.conv(x)).mean((2, 3)))))
        return y


def net(classes: int = 5) -> nn.Module:
    torch.manual_seed(4)
    return Net(classes).eval()


INPUTS = {"x": torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(6))}


def randomise(parameters: Mapping[str, torch.Tensor], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def peft_saved(path: Path, config: peft.PeftConfig, base: nn.Module | None = None, seed: int = 0) -> Path:
    model = peft.get_peft_model(base or net(), config)
    randomise({name: own for name, own in model.named_parameters() if own.requires_grad}, seed)
    model.save_pretrained(str(path))
    return path


def lycoris_saved(path: Path, **options: Any) -> Path:
    network = lycoris.create_lycoris(net(), 1.0, linear_dim=2, linear_alpha=3, warn_on_unmatched=False, **options)
    network.apply_to()
    randomise(dict(network.named_parameters()))
    state = network.state_dict()
    path.mkdir()
    save_file({name: own.contiguous() for name, own in state.items()}, path / "a.safetensors")
    return path / "a.safetensors"


def oracles(bundle: Bundle) -> dict[str, str]:
    for record in bundle.manifest.oracles.values():
        assert 0 < record["error"] <= 1e-6
    return {task: record["oracle"] for task, record in bundle.manifest.oracles.items()}


def test_every_method_is_compared_with_its_own_library(tmp_path: Path) -> None:
    configs = {
        "lora": peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, modules_to_save=["norm"], bias="lora_only"),
        "dora": peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, use_dora=True),
        "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["up"]),
        "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
        "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS),
        "tucker": TuckerConfig(ranks=2, scale=0.5, target_modules=TARGETS),
    }
    files = {task: peft_saved(tmp_path / task, config) for task, config in configs.items()}
    files["locon"] = lycoris_saved(tmp_path / "locon", algo="locon", use_tucker=True)
    files["lyloha"] = lycoris_saved(tmp_path / "lyloha", algo="loha")
    files["lylokr"] = lycoris_saved(tmp_path / "lylokr", algo="lokr")
    base = net()
    adapters = {task: load_adapter(file, base=base) for task, file in files.items()}
    adapters["memory"] = nets.adapter_for(base, {"up.weight": (2, 2)}, seed=1)
    drawn = torch.get_rng_state()
    bundle = export_bundle(base, adapters, tmp_path / "b", example_inputs=INPUTS, folded=True)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert oracles(bundle) == {
        **dict.fromkeys(configs, PEFT),
        **dict.fromkeys(["locon", "lyloha", "lylokr"], LYCORIS),
        "memory": "merged",
    }
    assert "in memory" in bundle.oracle("memory")["reason"]
    bundle.add("ia3", adapters["lora"])
    assert (bundle.oracle("ia3")["oracle"], bundle.oracle("ia3")["error"]) == ("merged", None)


def test_ranks_that_training_cut_are_compared_with_peft(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, total_step=4, target_modules=TARGETS)
    model = peft.get_peft_model(net(), config)
    torch.manual_seed(0)
    for step in range(4):
        model(**INPUTS).square().sum().backward()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight), alpha=0.3)
        model.base_model.update_and_allocate(step)
    model.save_pretrained(str(tmp_path / "adalora"))
    adapter = load_adapter(tmp_path / "adalora", base=net())
    assert {delta.ranks[0] for delta in adapter.deltas.values()} <= {1, 2, 3}
    bundle = export_bundle(net(), {"adalora": adapter}, tmp_path / "b", example_inputs=INPUTS)
    assert oracles(bundle) == {"adalora": PEFT}


def test_sixteen_bits_are_compared_with_the_library_in_32(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["head"])
    file = peft_saved(tmp_path / "lora", config, net(classes=3))
    half = net().half()
    adapter = load_adapter(file, base=half)
    inputs = {"x": INPUTS["x"].half()}
    checks = export_folded(half, adapter, tmp_path / "m.onnx", example_inputs=inputs, rename={"x": "pixels"})
    assert [(check.oracle, check.limit) for check in checks] == [("merged", 2e-3), (PEFT, 2e-3)] * 2


# What transformers says of what PEFT asks it.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_a_decoder_with_a_cache_and_tied_weights_is_run_by_peft(tmp_path: Path) -> None:
    base = saved(tmp_path / "llama", "LlamaForCausalLM", **TEXT, num_key_value_heads=2, tie_word_embeddings=True)
    model = load_base(str(base)).module
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", use_dora=True)
    adapter = load_adapter(peft_saved(tmp_path / "lora", config, model), base=load_base(str(base)).view)
    checks = export_folded(str(base), adapter, tmp_path / "m.onnx")
    assert {check.oracle for check in checks} == {"merged", PEFT}
    assert {"logits", "present.0.key", "present.0.value"} <= set(checks[-1].outputs)


def without(adapter: Adapter, module: str) -> Adapter:
    return replace(adapter, deltas={name: delta for name, delta in adapter.deltas.items() if module not in name})


def scaled(adapter: Adapter, module: str) -> Adapter:
    deltas = {n: replace(d, scale=1.1 * d.scale) if module in n else d for n, d in adapter.deltas.items()}
    return replace(adapter, deltas=deltas)


@pytest.mark.parametrize(("wrong", "module"), [(without, "conv"), (scaled, "up")])
@pytest.mark.parametrize("oracle", [PEFT, LYCORIS])
def test_a_wrong_reading_is_no_export(
    tmp_path: Path, oracle: str, module: str, wrong: Callable[[Adapter, str], Adapter]
) -> None:
    if oracle == PEFT:
        file = peft_saved(tmp_path / "a", peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS))
    else:
        file = lycoris_saved(tmp_path / "a", algo="locon")
    adapter = wrong(load_adapter(file, base=net()), module)
    with pytest.raises(NotEquivalent, match=f"task 'adapter'.*against the forward of {oracle}, got"):
        export_folded(net(), adapter, tmp_path / "m.onnx", example_inputs=INPUTS)
    assert not (tmp_path / "m.onnx").exists()


def test_a_bundle_of_a_wrong_reading_is_not_written(tmp_path: Path) -> None:
    file = peft_saved(tmp_path / "a", peft.LoHaConfig(r=2, target_modules=TARGETS))
    adapter = scaled(load_adapter(file, base=net()), "conv")
    with pytest.raises(NotEquivalent, match=f"factored export of task 'a'.*against the forward of {PEFT}"):
        export_bundle(net(), {"a": adapter}, tmp_path / "b", example_inputs=INPUTS)
    assert not (tmp_path / "b").exists()


def test_what_no_library_runs_is_never_said_to_be_proved(tmp_path: Path) -> None:
    whole = load_file(lycoris_saved(tmp_path / "a", algo="locon"))
    states = {
        "no-scale": {name: own for name, own in whole.items() if name != "lycoris_up.alpha"},
        "dotted": {name.replace("lycoris_up.", "diffusion_model.up."): own for name, own in whole.items()},
        "on-input": {"lycoris_up.weight": torch.full((6,), 0.5), "lycoris_up.on_input": torch.tensor(1)},
    }
    base = load_base(net(), example_inputs=INPUTS)
    raw = base.graph()
    sources = Sources(Subject(base, raw.graph))
    for task, state in states.items():
        save_file(state, tmp_path / f"{task}.safetensors")
        found = sources.of(task, load_adapter(tmp_path / f"{task}.safetensors", base=base.module))
        assert (found.oracle, found.outputs) == ("merged", ())
        assert f"{LYCORIS} cannot be asked about {tmp_path}" in found.reason
    assert (
        "its names do not all begin with one of lycoris"
        in sources.to_json(dict.fromkeys(states, ""))["dotted"]["reason"]
    )

    place = peft_saved(tmp_path / "peft", peft.LoraConfig(r=2, target_modules=["up"]))
    adapter = load_adapter(place, base=base.module)
    ir.save(raw, tmp_path / "base.onnx")
    file = load_base(tmp_path / "base.onnx", weights=net().state_dict())
    assert "is no torch module" in Sources(Subject(file, raw.graph)).of("a", adapter).reason
    assert sources.of("a", adapter).oracle == PEFT
    (place / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is no longer there" in sources.of("b", adapter).reason


def test_a_manifest_of_an_earlier_version_has_no_oracles(conv_bundle: Bundle) -> None:
    import json

    from tpeft_deploy.bundle import manifest

    document = json.loads(conv_bundle.manifest.to_json())
    assert set(document.pop("oracles")) == set(conv_bundle.tasks)
    document["digest"] = manifest._digest(document)
    old = Bundle(conv_bundle.path, Manifest.from_json(json.dumps(document), source="it"))
    assert old.manifest.oracles == {}
    assert old.oracle("two")["oracle"] == "merged"


@pytest.fixture(scope="module")
def sourced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two tasks beside what they were read from."""
    place = tmp_path_factory.mktemp("sourced")
    configs = {
        "lora": peft.LoraConfig(r=2, target_modules=TARGETS),
        "loha": peft.LoHaConfig(r=2, target_modules=TARGETS),
    }
    files = {task: peft_saved(place / task, config) for task, config in configs.items()}
    adapters = {task: load_adapter(file, base=net()) for task, file in files.items()}
    export_bundle(net(), adapters, place / "bundle", example_inputs=INPUTS, folded=True)
    return place


def test_verify_compares_every_form_with_the_source(sourced: Path) -> None:
    base = load_base(net(), example_inputs=INPUTS)
    found = verify_bundle(sourced / "bundle", base=base, task="lora", against_source=sourced / "lora")
    own = [check for check in found.checks if check.oracle == PEFT]
    assert {check.form for check in own} >= {"factored", "banked", "folded"}
    assert all(check.task == "lora" and check.error <= 1e-6 for check in own)
    assert PEFT in found.reference
    assert found.left_out == (
        ("training library", "mixed and padded rows of lora are compared with merged weights only"),
    )
    for other in ("loha", "other"):
        peft_saved(sourced / "other", peft.LoraConfig(r=2, target_modules=TARGETS), seed=1)
        with pytest.raises(NotEquivalent, match=f"task 'lora'.*against the forward of {PEFT}"):
            verify_bundle(sourced / "bundle", base=base, task="lora", against_source=sourced / other)


def test_what_verify_needs_for_a_source_is_said(sourced: Path, tmp_path: Path) -> None:
    bundle, base = sourced / "bundle", load_base(net(), example_inputs=INPUTS)
    with pytest.raises(UnknownTask, match=r"got a bundle of 2 tasks\. Give task="):
        verify_bundle(bundle, base=base, against_source=sourced / "lora")
    with pytest.raises(UnsupportedBase, match="Give base="):
        verify_bundle(bundle, task="lora", against_source=sourced / "lora")
    with pytest.raises(FormatError, match="no training library reads"):
        verify_bundle(bundle, task="lora", base=base, against_source=tmp_path)
    with pytest.raises(FormatError, match="nothing there"):
        verify_bundle(bundle, task="lora", base=base, against_source=tmp_path / "none")
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(FormatError, match=f"got {LYCORIS} cannot be asked about"):
        verify_bundle(bundle, task="lora", base=base, against_source=tmp_path / "x.safetensors")
