"""Convolutions keep the form that their adapters' files have: what is stored, and what every form then computes."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from lycoris.modules.locon import LoConModule
from torch import nn

from tests.helpers import nets
from tests.helpers.exporters.matrix import LIMITS, error, merged, session
from tests.helpers.formats.trained import lycoris_file, randomise
from tpeft_deploy import Adapter, Bundle, Runtime, export_bundle, load_adapter
from tpeft_deploy.errors import IntegrityError
from tpeft_deploy.exporters.verify import verify_bundle
from tpeft_deploy.files import digest_file
from tpeft_deploy.formats.write import onnx_adapter
from tpeft_deploy.runtime.adapters.bank import Layout
from tpeft_deploy.runtime.sessions import onnx_bytes
from tpeft_deploy.training import TuckerConfig
from tpeft_deploy.tucker import TuckerDelta

X = {"x": torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(7))}
PADDED = ["plane", "line"]  # LyCORIS' forward leaves padding_mode out
PLAIN = ["strided", "point", "volume"]


class Convs(nn.Module):
    """Convolutions of one to three dimensions: strided, dilated, 1x1, with zeros and others around the image."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = nn.Conv2d(6, 8, 3, padding=2, dilation=2, padding_mode="reflect")
        self.strided = nn.Conv2d(8, 10, 3, stride=2, padding=1)
        self.point = nn.Conv2d(10, 12, 1, bias=False)
        self.line = nn.Conv1d(12, 10, 3, stride=2, padding=1, padding_mode="circular")
        self.volume = nn.Conv3d(10, 8, (2, 1, 2), padding=(1, 0, 1), dilation=(1, 1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.line(torch.tanh(self.point(self.strided(torch.tanh(self.plane(x))))).flatten(2)))
        z: torch.Tensor = torch.tanh(self.volume(y.reshape(-1, 10, 2, 2, 2)))
        return z


def convs() -> nn.Module:
    torch.manual_seed(4)
    return Convs().eval()


Trained = tuple[Adapter, nn.Module]  # what is read from the file, and the training library's own model


def from_peft(place: Path, config: peft.PeftConfig) -> Trained:
    model = peft.get_peft_model(convs(), config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(str(place))
    return load_adapter(place, base=convs()), model.merge_and_unload().eval()


def from_lycoris(place: Path, **options: bool) -> Trained:
    model = convs()
    wrappers = {
        f"lycoris_{name}": LoConModule(f"lycoris_{name}", getattr(model, name), lora_dim=2, alpha=1.5, **options)
        for name in PLAIN
    }
    for seed, wrapper in enumerate(wrappers.values()):
        randomise(wrapper, seed)
        wrapper.eval().apply_to()
    return load_adapter(lycoris_file(place / "locon.safetensors", wrappers), base=convs()), model


TRAINED: dict[str, Callable[[Path], Trained]] = {
    "lora": lambda place: from_peft(place, peft.LoraConfig(r=2, lora_alpha=3, target_modules=PADDED + PLAIN)),
    "locon": from_lycoris,
    "mid": lambda place: from_lycoris(place, use_tucker=True),
    "tucker": lambda place: from_peft(place, TuckerConfig(ranks=[3, 2], target_modules=PADDED + PLAIN)),
}


@pytest.mark.parametrize(
    ("first", "factors", "dtype"),
    [("lora", (0,), torch.float32), ("tucker", (0, 1), torch.float32), ("lora", (0,), torch.float16)],
)
def test_every_form_equals_the_library_for_adapters_of_the_other_form_too(
    tmp_path: Path, first: str, factors: tuple[int, ...], dtype: torch.dtype
) -> None:
    trained = {name: build(tmp_path / name) for name, build in TRAINED.items()}
    oracles = {name: model for name, (_, model) in trained.items()} | {"base": convs()}
    module = convs().to(dtype)
    inputs = {"x": X["x"].to(dtype)}
    bundle = export_bundle(module, {first: trained[first][0]}, tmp_path / "b", example_inputs=inputs, folded=True)
    assert {t.name: t.factors for t in bundle.manifest.targets if t.name != "point.weight"} == dict.fromkeys(
        ["plane.weight", "strided.weight", "line.weight", "volume.weight"], factors
    )
    assert len(next(t for t in bundle.manifest.targets if t.name == "point.weight").factors or ()) == 1
    for name, (adapter, _) in trained.items():
        bundle.add(name, adapter)
    assert_served(Bundle.open(bundle.path), oracles, LIMITS[dtype], dtype)


def assert_served(bundle: Bundle, oracles: dict[str, nn.Module], limit: float, dtype: torch.dtype) -> None:
    tasks = [*oracles, *reversed(oracles)]
    x = torch.randn(len(tasks), 6, 8, 8, generator=torch.Generator().manual_seed(8)).to(dtype)
    with torch.no_grad():
        expected = {task: copy.deepcopy(model).float()(x.float()).numpy() for task, model in oracles.items()}
    runtime = Runtime(bundle.path, provider="cpu")
    factored = session(bundle.path / "factored.onnx")
    mixed = runtime.run({"x": x.numpy()}, tasks=tasks)["output"]
    for row, task in enumerate(tasks):
        assert error(np.asarray(mixed[row]), expected[task][row]) <= limit, task
    for task in oracles:
        assert error(np.asarray(runtime.run({"x": x.numpy()}, task=task)["output"]), expected[task]) <= limit, task
        feeds = bundle.factors(task) if task != "base" else {}
        assert error(factored.run(None, {"x": x.numpy()} | feeds)[0], expected[task]) <= limit, task


class EveryChoice(nn.Module):
    """Convolutions whose changes are smallest with each set of factors that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(6, 8, 3, padding=1)
        self.whole = nn.Conv2d(8, 8, 3, stride=2)
        self.back_down = nn.ConvTranspose2d(8, 8, 3, stride=2)
        self.back_up = nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, groups=2)
        self.grouped_both = nn.Conv2d(16, 12, 3, groups=2)
        self.grouped_down = nn.Conv2d(12, 8, 2, groups=2)
        self.depthwise = nn.Conv2d(8, 16, 2, groups=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.whole(torch.tanh(self.down(x))))
        y = self.grouped(torch.tanh(self.back_up(torch.tanh(self.back_down(y)))))
        z: torch.Tensor = self.depthwise(torch.tanh(self.grouped_down(torch.tanh(self.grouped_both(torch.tanh(y))))))
        return z


CHOICES = {  # ranks -> the kind and the factors that they are served with
    "down": ((8, 1, 3, 3), "conv", (1,)),
    "whole": ((8, 8, 3, 3), "weight", ()),
    "back_down": ((1, 8, 3, 3), "conv_transpose", (0,)),
    "back_up": ((8, 1, 3, 3), "conv_transpose", (1,)),
    "grouped": ((2, 4, 3, 3), "weight", (0,)),
    "grouped_both": ((2, 2, 2, 2), "weight", (0, 1)),
    "grouped_down": ((8, 1, 2, 2), "weight", (1,)),
    "depthwise": ((16, 1, 2, 2), "weight", ()),
}


def test_every_choice_of_factors_serves_every_form(tmp_path: Path) -> None:
    torch.manual_seed(6)
    module = EveryChoice().eval()
    weights = dict(module.named_parameters())

    def adapter(seed: int, cut: int = 0) -> Adapter:
        ranks = {name: tuple(max(1, rank - cut) for rank in own) for name, (own, _, _) in CHOICES.items()}
        return Adapter(
            {f"{n}.weight": nets.delta(tuple(weights[f"{n}.weight"].shape), own, seed) for n, own in ranks.items()}
        )

    bundle = export_bundle(module, {"a": adapter(0)}, tmp_path / "b", example_inputs=X)
    found = {target.name: (target.kind, target.factors) for target in bundle.manifest.targets}
    assert found == {f"{name}.weight": (kind, factors) for name, (_, kind, factors) in CHOICES.items()}
    assert bundle.manifest.rows == "each"
    later = {"low": adapter(1, cut=7), "dense": adapter(2, cut=-9)}
    for name, change in later.items():
        bundle.add(name, change)
    adapters = {"a": adapter(0), **later, "base": None}
    tasks = [*adapters, *reversed(adapters)]
    x = {"x": torch.randn(len(tasks), 6, 8, 8, generator=torch.Generator().manual_seed(9))}
    mixed = Runtime(bundle.path, provider="cpu").run({"x": x["x"].numpy()}, tasks=tasks)["output"]
    factored = session(bundle.path / "factored.onnx")
    for row, task in enumerate(tasks):
        expected = merged(module, adapters[task], x)
        assert error(np.asarray(mixed[row]), expected[row]) <= LIMITS[torch.float32], task
        feeds = bundle.factors(task) if task != "base" else {}
        assert error(factored.run(None, {"x": x["x"].numpy()} | feeds)[0], expected) <= LIMITS[torch.float32], task
    assert (bundle.path / "factored.onnx").stat().st_size < 40_000  # no default is as large as a weight


def test_a_lora_stores_what_its_file_holds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs = nn.Sequential(nn.Conv2d(64, 32, 3, padding=1)).eval(), {"input": torch.randn(2, 64, 5, 5)}
    random = np.random.default_rng(0)
    core, up = random.standard_normal((4, 64, 3, 3), np.float32), random.standard_normal((32, 4), np.float32)
    lora = Adapter({"0.weight": TuckerDelta(core, (up, None, None, None), 0.1)})
    stored = core.size + up.size
    bundle = export_bundle(module, {"lora": lora}, tmp_path / "own", example_inputs=inputs)
    assert sum(array.size for array in bundle.factors("lora").values()) == stored
    both = export_bundle(module, {}, tmp_path / "any", example_inputs=inputs, max_rank=4)
    assert both.manifest.targets[0].factors == (0, 1)
    slots = both.feeds(lora)
    assert slots["0.weight.tpeft.down"].shape == (4 * 9, 64, 1, 1)
    assert sum(array.size for array in slots.values()) < 2 * stored


def test_a_bundle_of_before_opens_with_both_factors_and_its_own_ranks(tmp_path: Path) -> None:
    """Its manifest names no factors, and its LoRA was written with an identity for `down`."""
    torch.manual_seed(0)
    module, inputs = nn.Sequential(nn.Conv2d(40, 8, 3)).eval(), {"input": torch.randn(2, 40, 5, 5)}
    random = np.random.default_rng(0)
    factors = (random.standard_normal((8, 2), np.float32), None, None, None)
    lora = Adapter({"0.weight": TuckerDelta(random.standard_normal((2, 40, 3, 3), np.float32), factors, 0.1)})
    bundle = export_bundle(module, {}, tmp_path / "b", example_inputs=inputs)
    bundle.add("lora", lora)
    delta = lora.deltas["0.weight"]
    old = {"down": np.eye(40, dtype=np.float32)[..., None, None], "core": np.float32(0.1) * delta.core}
    rewrite(bundle, "lora", {f"0.weight.tpeft.{n}": a for n, a in (old | {"up": factors[0][..., None, None]}).items()})
    verified = verify_bundle(bundle.path)
    assert not [check for check in verified.checks if check.failure]
    wrong = dict(onnx_adapter.read(stored(bundle, "lora") / onnx_adapter.FILE))
    wrong["0.weight.tpeft.core"] = wrong["0.weight.tpeft.core"] * np.float32(1.001)
    rewrite(bundle, "lora", wrong)
    with pytest.raises(IntegrityError, match=r"adapter\.onnx_adapter.*got another"):
        verify_bundle(bundle.path)


def test_no_default_of_a_graph_has_rank_0(conv_bundle: Bundle) -> None:
    declared = onnx_bytes.declared((conv_bundle.path / "factored.onnx").read_bytes())
    defaults = {name: tensor.shape for name, tensor in declared.items() if ".tpeft." in name}
    assert defaults
    assert all(0 not in shape for shape in defaults.values())
    rows = Layout.of(conv_bundle).shapes
    assert {name for name in rows if ".core" in name}
    assert all(0 not in shape for shape in rows.values())


def stored(bundle: Bundle, task: str) -> Path:
    return bundle.path / "adapters" / task / bundle.digest(task)


def rewrite(bundle: Bundle, task: str, tensors: dict[str, np.ndarray]) -> None:
    """Let a manifest name no factors, and a task have other tensors in the file that ONNX Runtime reads."""
    place = stored(bundle, task)
    onnx_adapter.write(place / onnx_adapter.FILE, tensors)
    record = json.loads((place / "adapter.json").read_text())
    record["files"][onnx_adapter.FILE] = digest_file(place / onnx_adapter.FILE)
    (place / "adapter.json").write_text(json.dumps(record))
    document = json.loads((bundle.path / "manifest.json").read_text())
    for target in document["targets"]:
        target.pop("factors", None)
    del document["digest"]
    document["digest"] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    (bundle.path / "manifest.json").write_text(json.dumps(document))
