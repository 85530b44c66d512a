import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats import load_adapter
from tpeft_deploy.formats.peft import tucker as peft_tucker
from tpeft_deploy.formats.read.saved import peft_type
from tpeft_deploy.tucker import Array

PREFIX = "base_model.model."
CONFIG = {"peft_type": "TPEFT_TUCKER", "scale": 0.5, "ranks": 2, "base_digests": {}}


def tensors() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {
        "encoder.stem.tucker_core": (2, 3, 3, 1),
        "encoder.stem.tucker_factor.0": (8, 2),
        "encoder.stem.tucker_factor.3": (3, 1),
        "fc.tucker_core": (4, 4),
        "head.weight": (5, 4),
        "head.bias": (5,),
    }
    made: dict[str, Array] = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return made | {"norm.num_batches_tracked": np.asarray(3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, tensors())


def write(path: Path, saved: dict[str, Array], prefix: str = PREFIX, **config: Any) -> Path:
    save_file({prefix + name: tensor for name, tensor in saved.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        peft_tucker.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


class TestReading:
    def test_deltas_and_overrides(self, folder: Path) -> None:
        saved = tensors()
        adapter = peft_tucker.read(folder)
        assert set(adapter.deltas) == {"encoder.stem.weight", "fc.weight"}
        stem = adapter.deltas["encoder.stem.weight"]
        assert (stem.shape, stem.ranks, stem.scale) == ((8, 3, 3, 3), (2, 3, 3, 1), 0.5)
        core, out, last = (saved[f"encoder.stem.tucker_{part}"] for part in ("core", "factor.0", "factor.3"))
        expected = 0.5 * np.einsum("aikz,oa,lz->oikl", core, out, last, dtype=np.float64)
        np.testing.assert_allclose(stem.dense(), expected, atol=1e-12)
        np.testing.assert_allclose(adapter.deltas["fc.weight"].dense(), 0.5 * saved["fc.tucker_core"])
        assert set(adapter.overrides) == {"head.weight", "head.bias", "norm.num_batches_tracked"}
        np.testing.assert_array_equal(adapter.overrides["head.weight"], saved["head.weight"])
        assert adapter.overrides["norm.num_batches_tracked"] == 3
        assert adapter.source == str(folder)

    def test_keys_of_an_injected_model_have_no_prefix(self, tmp_path: Path) -> None:
        adapter = peft_tucker.read(write(tmp_path, tensors(), prefix=""))
        assert set(adapter.deltas) == {"encoder.stem.weight", "fc.weight"}

    def test_digests(self, tmp_path: Path) -> None:
        adapter = peft_tucker.read(write(tmp_path, tensors(), base_digests={"fc.weight": "ab" * 32}))
        assert adapter.base_digests == {"fc.weight": "ab" * 32}

    def test_found_by_its_configuration(self, folder: Path) -> None:
        assert peft_type(folder) == peft_tucker.TYPE
        assert set(load_adapter(folder).deltas) == {"encoder.stem.weight", "fc.weight"}

    def test_a_verified_copy_of_a_base_weight_is_left_out(self, tmp_path: Path) -> None:
        copy = np.ones((4, 4), np.float32)
        saved = tensors() | {"fc.base_layer.weight": copy, "fc.base_layer.bias": np.ones(4, np.float32)}
        write(tmp_path, saved, base_digests={"fc.weight": weight_digest(copy)})
        overrides = peft_tucker.read(tmp_path).overrides
        assert "fc.bias" in overrides
        assert not any("base_layer" in name or name == "fc.weight" for name in overrides)

    def test_a_base_with_its_own_base_layer(self, tmp_path: Path) -> None:
        saved = tensors() | {"head.base_layer.weight": np.ones((2, 2), np.float32)}
        assert "head.base_layer.weight" in peft_tucker.read(write(tmp_path, saved)).overrides

    def test_without_torch(self, folder: Path) -> None:
        code = f"""
import sys
from pathlib import Path
from tpeft_deploy.formats.peft import tucker as peft_tucker
peft_tucker.read(Path({str(folder)!r}))
print(sorted({{"torch", "peft", "transformers"}} & set(sys.modules)))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestPeftType:
    def test_stated_or_absent(self, folder: Path, tmp_path: Path) -> None:
        assert peft_type(folder) == "TPEFT_TUCKER"
        assert peft_type(tmp_path / "nowhere") is None
        assert peft_type(folder / "adapter_config.json") is None
        assert peft_type(folder / "adapter_model.safetensors") is None
        (folder / "adapter_config.json").write_text("{}")
        assert peft_type(folder) is None

    @pytest.mark.parametrize("text", [b"{", b"", b"[]", b"\xff\xfe"])
    def test_broken_json(self, folder: Path, text: bytes) -> None:
        (folder / "adapter_config.json").write_bytes(text)
        with pytest.raises(FormatError, match=r"adapter_config\.json: expected"):
            peft_type(folder)
        refusal(folder)


class TestDamage:
    @pytest.mark.parametrize("kept", [0, 4, 100, -1])
    def test_truncated(self, folder: Path, kept: int) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        assert "complete safetensors file" in refusal(folder)

    @pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
    def test_missing_file(self, folder: Path, file: str) -> None:
        (folder / file).unlink()
        assert file in refusal(folder)

    def test_only_a_pickle(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        assert "safe_serialization=True" in refusal(folder)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("name", ["fc.tucker_core", "head.bias"])
    def test_not_finite(self, tmp_path: Path, name: str, value: float) -> None:
        saved = tensors()
        saved[name].flat[0] = value
        assert f"{name}'" in refusal(write(tmp_path, saved))

    @pytest.mark.parametrize("scale", [None, math.nan, -math.inf, "1.0", True])
    def test_scale(self, tmp_path: Path, scale: Any) -> None:
        assert "a finite number as scale" in refusal(write(tmp_path, tensors(), scale=scale))

    def test_no_scale(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "TPEFT_TUCKER"}))
        assert "a finite number as scale" in refusal(folder)

    def test_another_peft_type(self, tmp_path: Path) -> None:
        assert "'LORA'" in refusal(write(tmp_path, tensors(), peft_type="LORA"))

    @pytest.mark.parametrize("digests", [None, [], {"fc.weight": 3}])
    def test_digests(self, tmp_path: Path, digests: Any) -> None:
        assert "base_digests" in refusal(write(tmp_path, tensors(), base_digests=digests))


class TestLostTensors:
    def test_core(self, tmp_path: Path) -> None:
        saved = tensors()
        del saved["encoder.stem.tucker_core"]
        assert "'encoder.stem': expected a tensor tucker_core" in refusal(write(tmp_path, saved))

    def test_factor(self, tmp_path: Path) -> None:
        # A mode without a factor is an identity.  Ranks with a factor are below the size, so that the change never
        # has the base's shape, and Adapter.check_shapes refuses it.
        saved = tensors()
        del saved["encoder.stem.tucker_factor.0"]
        assert peft_tucker.read(write(tmp_path, saved)).deltas["encoder.stem.weight"].shape == (2, 3, 3, 3)

    def test_whole_module(self, tmp_path: Path) -> None:
        digests = {"fc.weight": "ab" * 32, "gone.weight": "cd" * 32}
        assert "'gone.weight'" in refusal(write(tmp_path, tensors(), base_digests=digests))

    @pytest.mark.parametrize(
        "renamed",
        [
            "encoder.stem.tucker_cores",
            "encoder.stem.tucker_factor",
            "encoder.stem.tucker_factor.10",
            "encoder.stem.tucker_factor.-1",
            "encoder.stem.tucker_factor.0.weight",
            "tucker_core",
        ],
    )
    def test_renamed(self, tmp_path: Path, renamed: str) -> None:
        saved = tensors()
        saved[renamed] = saved.pop("encoder.stem.tucker_factor.0")
        assert f"{renamed}'" in refusal(write(tmp_path, saved))

    def test_mode_beyond_the_core(self, tmp_path: Path) -> None:
        saved = tensors()
        saved["fc.tucker_factor.2"] = np.ones((3, 1), np.float32)
        assert "modes 0 to 1" in refusal(write(tmp_path, saved))

    @pytest.mark.parametrize("shape", [(8, 3), (8,), (2, 8)])
    def test_rank_that_does_not_fit(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        saved = tensors() | {"encoder.stem.tucker_factor.0": np.ones(shape, np.float32)}
        assert "factor of mode 0" in refusal(write(tmp_path, saved))

    def test_core_of_whole_numbers(self, tmp_path: Path) -> None:
        assert "'fc'" in refusal(write(tmp_path, tensors() | {"fc.tucker_core": np.ones((4, 4), np.int64)}))

    def test_the_same_name_twice(self, tmp_path: Path) -> None:
        saved = {PREFIX + name: tensor for name, tensor in tensors().items()} | {"fc.tucker_core": np.ones((4, 4))}
        assert "base_model.model.fc.tucker_core" in refusal(write(tmp_path, saved, prefix=""))

    def test_nothing_at_all(self, tmp_path: Path) -> None:
        assert "no tensors at all" in refusal(write(tmp_path, {}))

    @pytest.mark.parametrize("digests", [{}, {"fc.weight": weight_digest(np.zeros((4, 4)))}])
    def test_a_base_weight_that_is_not_the_recorded_one(self, tmp_path: Path, digests: dict[str, str]) -> None:
        saved = tensors() | {"fc.base_layer.weight": np.ones((4, 4), np.float32)}
        assert "fc.base_layer.weight" in refusal(write(tmp_path, saved, base_digests=digests))

    def test_a_weight_that_is_replaced_and_changed(self, tmp_path: Path) -> None:
        saved = tensors() | {"fc.weight": np.ones((4, 4), np.float32)}
        assert "'fc.weight'" in refusal(write(tmp_path, saved))
