"""`convert` and `inspect` as a user meets them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import nets
from tests.helpers.commands import BASE, fail, succeed
from tpeft_deploy import Adapter, Bundle, TuckerDelta, load_adapter


@pytest.fixture
def two(tmp_path: Path, conv_adapters: dict[str, Adapter]) -> Path:
    path = tmp_path / "two.safetensors"
    path.write_bytes(conv_adapters["two"].to_bytes())
    return path


@pytest.fixture
def gained(tmp_path: Path) -> Path:
    """A delta and a gain of one weight, and a gain that stands alone."""
    delta = nets.delta((16, 8), (2, 2), seed=0)
    gains = {"up.weight": np.linspace(0.5, 2, 16, dtype=np.float32)[:, None], "head.weight": np.full((1, 16), 1.5)}
    path = tmp_path / "gained.safetensors"
    path.write_bytes(Adapter({"up.weight": delta}, gains=gains).to_bytes())
    return path


class TestConvert:
    def test_ours_to_peft_lora_and_back(self, tmp_path: Path, conv_adapters: dict[str, Adapter], two: Path) -> None:
        lora, back = tmp_path / "lora", tmp_path / "back"
        shown = json.loads(succeed("convert", two, lora, "--to", "peft-lora", "--base", BASE, "--json"))
        assert {Path(f["path"]).name for f in shown["files"]} == {"adapter_config.json", "adapter_model.safetensors"}
        succeed("convert", lora, back, "--to", "tpeft")
        got, expected = load_adapter(back), conv_adapters["two"]
        assert set(got.deltas) == set(expected.deltas)
        assert set(got.overrides) == set(expected.overrides)
        for name, delta in expected.deltas.items():
            np.testing.assert_allclose(got.deltas[name].dense(), delta.dense(), atol=1e-6)
        for name, array in expected.overrides.items():
            np.testing.assert_array_equal(got.overrides[name], array)

    def test_ours_to_locon_and_back(self, tmp_path: Path, conv_adapters: dict[str, Adapter]) -> None:
        source, locon, back = (tmp_path / f"{name}.safetensors" for name in ("plain", "locon", "back"))
        source.write_bytes(conv_adapters["plain"].to_bytes())
        succeed("convert", source, locon, "--to", "locon")
        succeed("convert", locon, back, "--to", "tpeft", "--base", BASE)
        got = load_adapter(back)
        for name, delta in conv_adapters["plain"].deltas.items():
            np.testing.assert_allclose(got.deltas[name].dense(), delta.dense(), atol=1e-6)

    def test_to_a_file_of_ours_is_the_same_bytes(self, tmp_path: Path, two: Path) -> None:
        succeed("convert", two, tmp_path / "again.safetensors", "--to", "tpeft")
        assert (tmp_path / "again.safetensors").read_bytes() == two.read_bytes()

    def test_to_onnx_runtimes_own_file(self, tmp_path: Path, two: Path, conv_bundle: Bundle) -> None:
        import onnxruntime

        out = tmp_path / "two.onnx_adapter"
        succeed("convert", two, out, "--to", "onnx-adapter", "--bundle", conv_bundle.path)
        read = onnxruntime.AdapterFormat.read_adapter(str(out)).get_parameters()
        expected = conv_bundle.factors("two")
        assert set(read) == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(read[name].numpy(), array)

    @pytest.mark.parametrize("nested", [False, True])
    def test_pickles_of_tensors_become_ours(self, tmp_path: Path, nested: bool) -> None:
        up, down = torch.randn(16, 2), torch.randn(2, 16, dtype=torch.float64).bfloat16()
        tensors = {"lora_unet_fc.lora_up.weight": up, "lora_unet_fc.lora_down.weight": down}
        torch.save({"state_dict": tensors} if nested else tensors, tmp_path / "a.ckpt")
        succeed("convert", tmp_path / "a.ckpt", tmp_path / "out", "--to", "tpeft")
        expected = up.double() @ down.double()
        np.testing.assert_allclose(load_adapter(tmp_path / "out").deltas["fc.weight"].dense(), expected, atol=1e-6)

    def test_a_peft_directory_with_a_pickle(self, tmp_path: Path) -> None:
        prefix = "base_model.model.fc.lora_"
        torch.save(
            {f"{prefix}A.weight": torch.ones(1, 9), f"{prefix}B.weight": torch.ones(9, 1)},
            tmp_path / "adapter_model.bin",
        )
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 3}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert "tpeft-deploy convert" in fail("inspect", tmp_path)
        succeed("convert", tmp_path, tmp_path / "out", "--to", "tpeft")
        assert load_adapter(tmp_path / "out").deltas["fc.weight"].dense()[0, 0] == 3.0

    def test_a_pickle_that_would_run_code_runs_none(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return Path.touch, (Path(tmp_path / "ran"),)  # type: ignore[return-value]

        (tmp_path / "a.bin").write_bytes(pickle.dumps({"w": Evil()}))
        assert "a pickle of tensors alone" in fail("convert", tmp_path / "a.bin", tmp_path / "out", "--to", "tpeft")
        assert not (tmp_path / "ran").exists()
        assert not (tmp_path / "out").exists()

    def test_a_scale_where_the_file_has_none(self, tmp_path: Path) -> None:
        from safetensors.numpy import save_file

        tensors = {"model.fc.flora_layer.param_G": np.ones((1, 1), np.float32)}
        tensors |= {f"model.fc.flora_layer.param_{axis}": np.ones((9, 1), np.float32) for axis in (0, 1)}
        save_file(tensors, tmp_path / "a.safetensors")
        assert "Give scale=" in fail("convert", tmp_path / "a.safetensors", tmp_path / "out", "--to", "tpeft")
        succeed("convert", tmp_path / "a.safetensors", tmp_path / "out", "--to", "tpeft", "--scale", "4")
        assert load_adapter(tmp_path / "out").deltas["fc.weight"].dense()[0, 0] == 4.0

    def test_nothing_is_overwritten_and_wrong_usage_is_told(
        self, tmp_path: Path, two: Path, gained: Path, conv_bundle: Bundle
    ) -> None:
        before = two.read_bytes()
        assert "one with content" in fail("convert", two, two, "--to", "tpeft")
        assert "one with content" in fail("convert", two, tmp_path, "--to", "peft-lora")
        assert two.read_bytes() == before
        assert "needs --bundle" in fail("convert", two, tmp_path / "o", "--to", "onnx-adapter", code=2)
        assert "needs --bundle" in fail("convert", two, tmp_path / "o", "--to", "tpeft", "--bundle", "b", code=2)
        assert "ends in .safetensors" in fail("convert", two, tmp_path / "o", "--to", "locon", code=2)
        assert "got a gain" in fail("convert", gained, tmp_path / "o", "--to", "peft-lora")
        arguments = ("convert", gained, tmp_path / "o", "--to", "onnx-adapter", "--bundle", conv_bundle.path)
        assert "a branch for its gain" in fail(*arguments)
        assert "a bundle with a factored.cuda.onnx" in fail(*arguments, "--graph", "factored.cuda.onnx")
        assert not (tmp_path / "o").exists()


class TestInspect:
    def test_a_gain_is_flagged_and_part_of_the_change(self, gained: Path) -> None:
        document = json.loads(succeed("inspect", gained, "--base", BASE, "--json"))
        found = {entry["weight"]: entry for entry in document["weights"]}
        module = nets.conv_net()[0]
        adapter = load_adapter(gained)
        weight = module.get_parameter("up.weight").detach().double().numpy()
        change = adapter.gains["up.weight"] * (weight + adapter.deltas["up.weight"].dense()) - weight
        assert found["up.weight"]["norm"] == pytest.approx(np.linalg.norm(change), rel=1e-6)
        assert found["up.weight"]["change"] == "delta and gain"
        assert found["up.weight"]["kind"] == "Linear"
        assert found["head.weight"]["change"] == "gain"
        assert found["head.weight"]["share"] == pytest.approx(0.5, rel=1e-6)
        assert document["folded_only"] is True
        assert all(entry["folded"] for entry in found.values())
        assert found["up.weight"]["parameters"] == adapter.deltas["up.weight"].parameters + 16
        assert "folded" in succeed("inspect", gained)

    def test_notes_are_printed(self, tmp_path: Path) -> None:
        from safetensors.numpy import save_file

        tensors = {"lycoris_fc.lora_up.weight": np.zeros((9, 5), np.float32)}
        save_file(tensors | {"lycoris_fc.lora_down.weight": np.ones((5, 9), np.float32)}, tmp_path / "a.safetensors")
        table = succeed("inspect", tmp_path / "a.safetensors")
        assert "note on the adapter: it changes nothing" in table
        assert "note on fc.weight: " in table
        document = json.loads(succeed("inspect", tmp_path / "a.safetensors", "--json"))
        assert set(document["notes"]) == {"*", "fc.weight"}
        assert document["weights"][0]["kind"] == "matrix"
        assert "kohya-lora" in fail("inspect", tmp_path / "a.safetensors", "--format", "nonsense")

    def test_a_picture(self, tmp_path: Path, two: Path, gained: Path) -> None:
        for source in (two, gained):
            picture = tmp_path / f"{source.stem}.png"
            succeed("inspect", source, "--plot", picture)
            assert picture.read_bytes().startswith(b"\x89PNG")
        document = json.loads(succeed("inspect", two, "--base", BASE, "--plot", tmp_path / "b.png", "--json"))
        assert document["weights"]

    def test_a_grid_has_a_row_a_layer(self) -> None:
        from tpeft_deploy.cli.plot import grid

        entries = [
            {"weight": name, "change": "delta", "norm": 1.0, "share": None}
            for name in ("enc.layer.0.fc.weight", "enc.layer.1.fc.weight", "enc.layer.1.out.weight", "head.weight")
        ]
        rows, columns, values = grid([*entries, {"weight": "b", "change": "override", "norm": 1.0, "share": None}])
        assert rows == ["enc.layer.0", "enc.layer.1", ""]
        assert columns == ["fc", "out", "head"]
        assert len(values) == 4

    def test_a_picture_without_matplotlib(self, tmp_path: Path, two: Path) -> None:
        code = f"""
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
from tpeft_deploy.cli import main
main(["inspect", {str(two)!r}, "--plot", {str(tmp_path / "x.png")!r}])
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "matplotlib to be installed" in done.stderr


class TestGains:
    def test_folded_is_gain_times_the_sum(self, tmp_path: Path, gained: Path) -> None:
        shown = json.loads(succeed("export", "folded", BASE, gained, "--out", tmp_path / "m.onnx", "--json"))
        assert all(check["error"] <= check["limit"] for check in shown["gate"])
        import onnxruntime

        module, inputs = nets.conv_net()
        adapter = load_adapter(gained)
        with torch.no_grad():
            for name in ("up.weight", "head.weight"):
                weight = module.get_parameter(name)
                delta = adapter.deltas[name].dense() if name in adapter.deltas else 0.0
                weight.copy_(torch.from_numpy(adapter.gains[name] * (weight.double().numpy() + delta)))
            expected = module(**inputs)["logits"].numpy()
        session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {"pixels": inputs["pixels"].numpy()})
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)

    def test_a_bundle_takes_them_where_it_was_exported_for_them(
        self, tmp_path: Path, gained: Path, own_bundle: Bundle
    ) -> None:
        assert "a branch for its gain" in fail("adapter", "add", own_bundle.path, f"x={gained}")
        assert "x" not in own_bundle.tasks
        succeed("export", "bundle", BASE, "--out", tmp_path / "b", "--adapter", f"x={gained}")
        succeed("adapter", "add", tmp_path / "b", f"y={gained}")


def test_a_bundle_resolves_names_of_other_tools(
    tmp_path: Path, own_bundle: Bundle, conv_adapters: dict[str, Adapter]
) -> None:
    from tpeft_deploy.formats.write import locon as to_locon

    to_locon.write(conv_adapters["plain"], tmp_path / "plain.safetensors")
    succeed("adapter", "add", own_bundle.path, f"kohya={tmp_path / 'plain.safetensors'}")
    read = own_bundle.adapter("kohya")
    for name, delta in conv_adapters["plain"].deltas.items():
        assert isinstance(read.deltas[name], TuckerDelta)
        np.testing.assert_allclose(read.deltas[name].dense(), delta.dense(), atol=1e-6)
