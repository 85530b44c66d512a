"""Outputs that do not keep rows apart, and inputs without axes: mixed rows, joined requests, the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from torch import nn

from tests.helpers import nets
from tests.helpers.server.in_process import over_grpc, over_rest
from tests.server.conftest import serve
from tpeft_deploy import Adapter, Bundle, Runtime, export_bundle
from tpeft_deploy.cli import main
from tpeft_deploy.errors import InputError
from tpeft_deploy.exporters import verify_bundle
from tpeft_deploy.runtime import Limits
from tpeft_deploy.runtime.sessions.shape_buckets import Buckets
from tpeft_deploy.tucker import Array

TARGETS = {"enter.weight": (3, 3), "leave.weight": (2, 2)}
JOINT = ["scores", "mean", "shares"]
Answers = Mapping[str, Array | list[Array]]


class Crowd(nn.Module):
    """Outputs of every kind, and two scalars that all rows share, one of them through a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.clock, self.leave = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, pixels: torch.Tensor, timestep: torch.Tensor, strength: torch.Tensor) -> dict[str, torch.Tensor]:
        clock = torch.sin(timestep.float() * torch.arange(1, 5))
        x = self.leave(torch.tanh(self.enter(pixels) + strength * self.clock(clock)))
        return {
            "rows": x,
            "scores": x @ x.t(),
            "mean": x.mean(0),
            "shares": x.softmax(0),
            "angles": strength * clock,
        }


def module() -> nn.Module:
    torch.manual_seed(5)
    return Crowd().eval()


def inputs(rows: int, seed: int = 0, timestep: int = 7, strength: float = 0.5) -> dict[str, Array]:
    pixels = np.random.default_rng(seed).standard_normal((rows, 6)).astype(np.float32)
    return {"pixels": pixels, "timestep": np.array(timestep), "strength": np.array(strength, np.float32)}


def merged(own: nn.Module, adapter: Adapter | None, given: Mapping[str, Array]) -> dict[str, Array]:
    weights = own.state_dict()
    for name, delta in (adapter.deltas if adapter is not None else {}).items():
        weights[name] = (weights[name].double() + torch.from_numpy(delta.dense())).float()
    tensors = {name: torch.from_numpy(array) for name, array in given.items()}
    with torch.no_grad():
        found = torch.func.functional_call(own, weights, (), tensors)
    return {name: value.numpy() for name, value in found.items() if isinstance(value, torch.Tensor)}


def close(got: object, wanted: Array) -> None:
    array = np.asarray(got)
    assert array.shape == wanted.shape
    assert np.linalg.norm(array - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter | None]:
    own = module()
    return {
        "base": None,
        "warm": nets.adapter_for(own, TARGETS, seed=1),
        "cold": nets.adapter_for(own, TARGETS, seed=2),
    }


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, Adapter | None]) -> Bundle:
    example = {name: torch.from_numpy(array) for name, array in inputs(3).items()}
    given = {task: adapter for task, adapter in adapters.items() if adapter is not None}
    return export_bundle(module(), given, tmp_path_factory.mktemp("crowd") / "crowd", example_inputs=example)


def opened(bundle: Bundle, **options: Any) -> Runtime:
    return Runtime(bundle.path, provider="cpu", threads=1, **options)


def test_what_outputs_do_is_measured_and_scalars_stay_scalars(crowd: Bundle) -> None:
    manifest = crowd.manifest
    kinds = {port.name: port.rows for port in manifest.outputs}
    assert kinds == {"rows": "each", **dict.fromkeys(JOINT, "joint"), "angles": "shared"}
    assert (manifest.rows, manifest.rows_reason) == ("each", "")
    assert {port.name: port.shape for port in manifest.inputs if port.name != "pixels"} == {
        "timestep": (),
        "strength": (),
    }
    assert crowd.example()["timestep"].shape == ()
    found = verify_bundle(crowd.path)
    unchecked = ["training library", *(f"mixed rows of output {name!r}" for name in JOINT)]
    assert [what for what, _ in found.left_out] == unchecked
    assert max(check.error for check in found.checks) <= 1e-5


def test_one_task_has_every_output_and_rows_of_several_those_that_keep_apart(
    crowd: Bundle, adapters: dict[str, Adapter | None]
) -> None:
    own, given = module(), inputs(3, 1, timestep=11, strength=-1.5)
    with opened(crowd) as runtime:
        for task, adapter in adapters.items():
            for answer in (runtime.run(given, task), runtime.run(given, tasks=[task] * 3)):
                for name, wanted in merged(own, adapter, given).items():
                    close(answer[name], wanted)
        tasks = ["base", "warm", "base"]
        for asked in (None, *(["rows", name] for name in JOINT)):
            name = "scores" if asked is None else asked[1]
            with pytest.raises(InputError, match=rf"output '{name}'.*batch as a whole.*others.*rows, angles"):
                runtime.run(given, tasks=tasks, outputs=asked)
        with pytest.raises(InputError, match=r"outputs among rows, scores.*got 'row'"):
            runtime.run(given, outputs=["row"])
        answer = runtime.run(given, tasks=tasks, outputs=["angles", "rows"])
        assert list(answer) == ["angles", "rows"]
        close(answer["angles"], merged(own, None, given)["angles"])
        for row, task in enumerate(tasks):
            close(answer["rows"][row], merged(own, adapters[task], given)["rows"][row])


@pytest.mark.parametrize("group", [False, True])
def test_requests_are_joined_only_where_no_answer_depends_on_others(
    crowd: Bundle, adapters: dict[str, Adapter | None], group: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = module()
    asked = [
        (
            ["base", "warm", "cold"][n % 3],
            inputs(1 + n % 2, n, timestep=7 + n % 2),
            ["rows", "angles"] if n % 4 else None,
        )
        for n in range(16)
    ]
    if group:
        manifest = replace(crowd.manifest, rows="group", rows_reason="a test")
        monkeypatch.setattr(Bundle, "open", lambda path: Bundle(Path(path), manifest))
    with opened(crowd, limits=Limits(max_delay=0.05)) as runtime:

        async def ask() -> list[Answers]:
            return await asyncio.gather(
                *(runtime.infer(given, task, outputs=outputs) for task, given, outputs in asked),
                runtime.infer(inputs(3, 99), tasks=["base", "warm", "cold"], outputs=["rows"]),
            )

        *answers, mixed = asyncio.run(ask())
        for (task, given, outputs), answer in zip(asked, answers, strict=True):
            wanted = merged(own, adapters[task], given)
            assert list(answer) == (outputs or list(wanted))
            for name, array in answer.items():
                close(array, wanted[name])
        for row, task in enumerate(adapters):
            close(mixed["rows"][row], merged(own, adapters[task], inputs(3, 99))["rows"][row])
        joined = runtime.batching().joined
        assert joined[1] >= 4  # those that ask for all outputs run alone
        assert max(joined) > 1
        with pytest.raises(InputError, match="output 'mean'"):
            asyncio.run(runtime.infer(inputs(2), tasks=["warm", "cold"], outputs=["mean"]))


def test_buffers_of_fixed_shapes_do_not_fill_up_what_is_not_kept_apart(crowd: Bundle) -> None:
    bucket = Buckets(crowd.manifest).choose(inputs(3), np.zeros(1, np.int64))
    assert dict(bucket.sizes)["batch"] == 3


def clip() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    text = {**sizes, "vocab_size": 40, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, return_dict=True)
    model = transformers.CLIPModel._from_config(config, attn_implementation="eager")
    return model.eval(), {
        "input_ids": torch.randint(3, 40, (3, 7)),
        "pixel_values": torch.randn(3, 3, 16, 16),
        "attention_mask": torch.ones(3, 7, dtype=torch.int64),
    }


def test_clip_as_transformers_computes_it(tmp_path: Path) -> None:
    own, example = clip()
    projections = {"visual_projection.weight": (4, 4), "text_projection.weight": (4, 4)}
    adapters = {"lora": nets.adapter_for(own, projections, seed=1), "tuck": nets.adapter_for(own, projections, seed=2)}
    bundle = export_bundle(own, adapters, tmp_path / "clip", example_inputs=example)
    kinds = {port.name: port.rows for port in bundle.manifest.outputs}
    assert {kinds["logits_per_image"], kinds["logits_per_text"]} == {"joint"}
    assert {kinds["text_embeds"], kinds["image_embeds"]} == {"each"}
    assert bundle.manifest.rows == "each"
    given = {name: tensor.numpy() for name, tensor in example.items()}
    with opened(bundle) as runtime:
        close(runtime.run(given, "lora")["logits_per_image"], merged(own, adapters["lora"], given)["logits_per_image"])
        for tasks in (["base", "lora", "tuck"], ["base", "lora", "base"]):
            with pytest.raises(InputError, match=r"output 'logits_per_image'.*text_embeds"):
                runtime.run(given, tasks=tasks)
        answer = runtime.run(given, tasks=["base", "lora", "tuck"], outputs=["text_embeds", "image_embeds"])
        for row, adapter in enumerate([None, *adapters.values()]):
            for name in ("text_embeds", "image_embeds"):
                close(answer[name][row], merged(own, adapter, given)[name][row])


@pytest.mark.parametrize("ask", [over_rest, over_grpc])
def test_the_server_refuses_mixed_rows_of_them_and_takes_scalars(
    crowd: Bundle, adapters: dict[str, Adapter | None], tmp_path: Path, ask: Callable[..., dict[str, Array]]
) -> None:
    own, given = serve(crowd, tmp_path), inputs(3, 4)
    try:
        for answer in (ask(own, "warm", given), ask(own, "crowd", given, ["warm"] * 3)):
            for name, wanted in merged(module(), adapters["warm"], given).items():
                close(answer[name], wanted)
        with pytest.raises(InputError, match=r"output 'scores'.*rows, angles"):
            ask(own, "crowd", given, list(adapters))
        sent = {**given, "timestep": given["timestep"][None]}  # as many clients send a scalar
        answer = ask(own, "crowd", sent, list(adapters), ["rows"])
        assert list(answer) == ["rows"]
        for row, adapter in enumerate(adapters.values()):
            close(answer["rows"][row], merged(module(), adapter, given)["rows"][row])
        with pytest.raises(InputError, match=r"input 'timestep'.*shape \[\], got \[2\]"):
            ask(own, "base", {**given, "timestep": np.array([7, 7])})
        described = {one["name"]: one["shape"] for one in own.service.model_metadata(own.who(), "crowd")["inputs"]}
        assert described == {"pixels": [-1, 6], "timestep": [], "strength": [], "adapter": [-1]}
    finally:
        own.runtime.close()
        own.state.close()


def test_scalars_from_a_file(crowd: Bundle, tmp_path: Path) -> None:
    given = inputs(2, 8, timestep=3)
    np.savez(tmp_path / "in.npz", **given)  # type: ignore[arg-type]
    arguments = ["run", str(crowd.path), "--input", str(tmp_path / "in.npz"), "--output", str(tmp_path / "out.npz")]
    for more, names in (([], ["rows", *JOINT, "angles"]), (["--tasks", "base,base", "--outputs", "rows"], ["rows"])):
        result = CliRunner().invoke(main, [*arguments, "--provider", "cpu", *more])
        assert result.exit_code == 0, result.output
        with np.load(tmp_path / "out.npz") as found:
            assert found.files == names
            for name in names:
                close(found[name], merged(module(), None, given)[name])
    result = CliRunner().invoke(main, [*arguments, "--provider", "cpu", "--tasks", "base,warm"])
    assert result.exit_code == 1
    assert "output 'scores'" in result.stderr
    assert "\n" not in result.stderr.strip()
