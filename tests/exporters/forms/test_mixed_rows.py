"""Rows of different adapters in one run, where a layer sees no batch: stacked experts, and what all rows share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from tpeft_deploy import Runtime, export_bundle, load_adapter
from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle import slots
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.errors import UnknownTarget, UnsupportedTarget
from tpeft_deploy.exporters.bases.hugging_face import load_directory
from tpeft_deploy.exporters.planning import plan_bundle
from tpeft_deploy.tucker import TuckerDelta

LIMIT = 1e-5
TASKS = ["a", "base", "b", "b", "a"]
Inputs = dict[str, torch.Tensor]


class Experts(nn.Module):
    """Two stacks of matrices, each on another side of the product."""

    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 10, 6))
        self.second = nn.Parameter(torch.randn(4, 10, 5))

    def forward(self, tokens: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        inner = torch.tanh(torch.bmm(self.first[experts], tokens.unsqueeze(-1)).squeeze(-1))
        return torch.bmm(inner.unsqueeze(1), self.second[experts]).squeeze(1)


class Routed(nn.Module):
    """Every row picks an expert for each of its 3 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 4), Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, 6)
        y: torch.Tensor = self.experts(tokens, self.gate(tokens).argmax(-1)).reshape(x.shape[0], -1, 5)
        return y


class Timed(nn.Module):
    """An image net conditioned on one time for the whole batch, and on a table of places without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.more = nn.Linear(4, 16), nn.Linear(16, 6)
        self.places, self.table = nn.Linear(3, 6), nn.Parameter(torch.randn(20, 3))
        self.conv, self.out = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        step = self.more(nn.functional.silu(self.time(torch.sin(t * torch.arange(1, 5)))))
        places = self.places(self.table).T.reshape(6, 4, 5)
        y: torch.Tensor = self.out(torch.tanh((self.conv(x) + step[:, None, None]) * torch.sigmoid(places)))
        return y


class Asked(nn.Module):
    """Learned queries that attend to each row's tokens, and are repeated for every row first, as in DETR."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Embedding(5, 8)
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries = self.queries.weight.unsqueeze(0).repeat(x.shape[0], 1, 1)
        found: torch.Tensor = torch.softmax(self.q_proj(queries) @ self.k_proj(x).mT, -1) @ x
        return found


class Summed(nn.Module):
    """A layer, and a product with a parameter that is used in a way no branch takes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x) @ (self.table + self.table.T)
        return y


def routed(rows: int) -> Inputs:
    return {"x": torch.randn(rows, 3, 6)}


def timed(rows: int) -> Inputs:
    return {"x": torch.randn(rows, 3, 4, 5), "t": torch.tensor([0.7])}


def asked(rows: int) -> Inputs:
    return {"x": torch.randn(rows, 4, 8)}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize(
    ("make", "inputs", "config"),
    [
        pytest.param(
            Routed,
            routed,
            {"target_parameters": ["experts.first", "experts.second"], "target_modules": []},
            id="experts",
        ),
        pytest.param(Timed, timed, {"target_modules": ["time", "more", "places", "conv"]}, id="shared"),
        pytest.param(Asked, asked, {"target_modules": ["q_proj", "k_proj"]}, id="repeated"),
    ],
)
def test_a_run_serves_rows_of_different_adapters(
    make: Callable[[], nn.Module], inputs: Callable[[int], Inputs], config: dict[str, list[str]], tmp_path: Path
) -> None:
    tuned, adapters = {"base": seeded(make)}, {}
    for seed, task in enumerate("ab"):
        model = get_peft_model(seeded(make), LoraConfig(r=seed + 1, lora_alpha=2, **config))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / task)
        tuned[task] = model.eval()
        adapters[task] = load_adapter(tmp_path / task, base=tuned["base"])
    shapes = {name: {0: "batch"} if len(x.shape) > 1 else None for name, x in inputs(2).items()}
    bundle = export_bundle(
        tuned["base"], adapters, tmp_path / "bundle", example_inputs=inputs(2), dynamic_shapes=shapes
    )
    assert bundle.manifest.rows == "each", bundle.manifest.rows_reason
    for rows in (3, 5):
        compare(bundle, tuned, inputs(rows), TASKS[:rows])


def compare(bundle: Bundle, tuned: dict[str, nn.Module], inputs: Inputs, tasks: list[str]) -> None:
    runtime = Runtime(bundle.path, provider="cpu")
    (got,) = runtime.run({name: x.numpy() for name, x in inputs.items()}, tasks=tasks).values()
    for row, task in enumerate(tasks):
        with torch.no_grad():
            own = {name: x[row : row + 1] if x.ndim > 1 else x for name, x in inputs.items()}
            expected = tuned[task](**own)[0].numpy()
        assert np.abs(got[row] - expected).max() <= LIMIT * np.abs(expected).max(), (row, task)


def test_mixtures_of_experts_load_in_the_form_that_can_be_exported(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=20, num_hidden_layers=1, num_local_experts=4, **sizes))
    model.save_pretrained(tmp_path)
    loaded: Any = load_directory(tmp_path)[0]
    assert loaded.config._experts_implementation == "batched_mm"


@given(st.integers(0, 2**16), st.booleans(), st.booleans())
def test_slots_of_experts_hold_the_whole_change(seed: int, placed: bool, transposed: bool) -> None:
    """`placed`: each expert's part of the core in rows or columns of its own, as LoRA on parameters has it."""
    random = np.random.default_rng(seed)
    core = random.standard_normal((3, 6, 5))
    if placed:
        core *= np.repeat(np.eye(3), 2, axis=1)[:, :, None]
    factors = (None, random.standard_normal((7, 6)), random.standard_normal((8, 5)))
    delta = TuckerDelta(core, factors, 0.5)
    if transposed:
        delta = TuckerDelta(core.swapaxes(1, 2), (None, factors[2], factors[1]), 0.5)
    target = Target("w", "experts", delta.shape, "float64")
    tensors = slots.fill(target, delta)
    assert slots.ranks_of(target, tensors) == {"R": 2 if placed else 5}
    np.testing.assert_allclose(slots.change_of(target, tensors), delta.dense(), atol=1e-10)


def change(*names: str) -> Adapter:
    factors = (np.ones((8, 1)), np.ones((8, 1)))
    return Adapter({name: TuckerDelta(np.ones((1, 1)), factors) for name in names})


def test_a_target_for_one_adapter_per_run_says_why(tmp_path: Path) -> None:
    both = {"a": change("fc.weight", "table")}
    bundle = export_bundle(seeded(Summed), both, tmp_path / "bundle", example_inputs=asked(2))
    assert bundle.manifest.rows == "group"
    assert set(bundle.manifest.rows_reasons) == {"table"}
    assert "W + dW" in bundle.manifest.rows_reasons["table"]
    assert "--exclude" in bundle.manifest.rows_reason


def test_no_adapter_changes_what_is_excluded(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTarget, match=r"exclude table from the targets.*would be lost"):
        export_bundle(seeded(Summed), {"a": change("table")}, tmp_path / "x", example_inputs=asked(2), exclude=["tab*"])
    with pytest.raises(UnknownTarget, match="exclude 'other'"):
        plan_bundle(seeded(Summed), {}, name="x", example_inputs=asked(2), exclude=["other"])
    plan = plan_bundle(seeded(Asked), {}, name="x", example_inputs=asked(2), exclude=["q_proj", "*queries*"])
    assert [target.name for target in plan.draft.targets] == ["k_proj.weight"]
