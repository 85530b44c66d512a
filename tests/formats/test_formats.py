"""What `load_adapter` does around the readers: finds files, cuts and names modules, accounts for every tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from tests.helpers import nets
from tpeft_deploy import Adapter, TuckerDelta
from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.errors import BaseMismatch, FormatError, ShapeError, UnknownTarget, UnsupportedBase
from tpeft_deploy.formats import FORMATS, load_adapter
from tpeft_deploy.formats.read.base_view import Lazy, view
from tpeft_deploy.formats.read.names import Names
from tpeft_deploy.formats.readers import READERS
from tpeft_deploy.tucker import Array

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def lora(module: str, outputs: int = 8, inputs: int = 8) -> dict[str, Array]:
    return {f"{module}.lora_A.weight": ones(2, inputs), f"{module}.lora_B.weight": ones(outputs, 2)}


def kohya(module: str) -> dict[str, Array]:
    pair = {f"{module}.lora_down.weight": ones(2, 8), f"{module}.lora_up.weight": ones(8, 2)}
    return pair | {f"{module}.alpha": np.array(2.0, np.float32)}


def peft(path: Path, tensors: dict[str, Array], **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file({f"base_model.model.{name}": t for name, t in tensors.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return path


def file(path: Path, tensors: dict[str, Array]) -> Path:
    save_file(tensors, path / "x.safetensors")
    return path / "x.safetensors"


class Base(nn.Module):
    def __init__(self, *modules: str) -> None:
        super().__init__()
        for name in modules:
            place: nn.Module = self
            *above, last = name.split(".")
            for part in above:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module(last, nn.Linear(8, 8))


class TestFiles:
    def test_our_own_file_is_known_by_its_header(self, tmp_path: Path) -> None:
        adapter = Adapter({"a.weight": nets.delta((8, 8), (2, 2), 0)})
        for name in ("any-name.safetensors", "adapter.safetensors"):
            (tmp_path / name).write_bytes(adapter.to_bytes())
            assert load_adapter(tmp_path / name).to_bytes() == adapter.to_bytes()
        assert load_adapter(tmp_path).to_bytes() == adapter.to_bytes()
        with pytest.raises(FormatError, match="Leave scale out"):
            load_adapter(tmp_path, scale=2.0)

    def test_another_file_may_have_our_files_name(self, tmp_path: Path) -> None:
        file(tmp_path, kohya("lycoris_fc")).rename(tmp_path / "adapter.safetensors")
        assert set(load_adapter(tmp_path / "adapter.safetensors").deltas) == {"fc.weight"}

    def test_peft_tensors_bring_the_config_beside_them(self, tmp_path: Path) -> None:
        directory = peft(tmp_path, lora("fc"))
        for path in (directory, directory / "adapter_model.safetensors"):
            assert load_adapter(path).deltas["fc.weight"].scale == 2.0

    @pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.ckpt"])
    def test_a_pickle_is_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(FormatError, match=r"a pickle, which can run code.*tpeft-deploy convert"):
            load_adapter(tmp_path / name)
        (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
        (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(FormatError, match="a pickle"):
            load_adapter(tmp_path)

    def test_a_directory_of_something_else(self, tmp_path: Path) -> None:
        file(tmp_path, kohya("lycoris_fc"))
        with pytest.raises(FormatError, match=r"one with x.safetensors\. Give the .safetensors file itself"):
            load_adapter(tmp_path)

    def test_the_format_can_be_asked_for(self, tmp_path: Path) -> None:
        path = file(tmp_path, kohya("lycoris_fc"))
        assert load_adapter(path, format="kohya-lora").deltas
        with pytest.raises(FormatError, match=r"lycoris_fc.alpha"):
            load_adapter(path, format="lycoris-lokr")
        with pytest.raises(FormatError, match="header written by tpeft-deploy"):
            load_adapter(path, format="tpeft")
        with pytest.raises(FormatError, match=r"expected a format of tpeft, peft-tucker, .*got 'lora'"):
            load_adapter(path, format="lora")

    def test_every_reader_has_the_verbs_and_a_name_of_its_own(self) -> None:
        assert len(set(FORMATS)) == len(FORMATS) == len(READERS) + 2
        for reader in READERS:
            assert reader.marks <= reader.suffixes
            assert callable(reader.matches)
            assert callable(reader.read)


class TestTensors:
    def test_heads_biases_and_buffers_of_a_peft_directory(self, tmp_path: Path) -> None:
        whole = {
            "head.weight": ones(3, 8),
            "fc.base_layer.bias": ones(8),
            "norm.running_mean": ones(8),
            "norm.num_batches_tracked": np.array(3),
        }
        adapter = load_adapter(peft(tmp_path, lora("fc") | whole))
        assert set(adapter.overrides) == {"head.weight", "fc.bias", "norm.running_mean", "norm.num_batches_tracked"}
        assert adapter.overrides["norm.num_batches_tracked"].shape == ()

    def test_a_copy_of_an_adapted_weight_ties_the_adapter_to_its_base(self, tmp_path: Path) -> None:
        base = Base("fc")
        weight = base.get_parameter("fc.weight").detach().numpy()
        path = peft(tmp_path, lora("fc") | {"fc.base_layer.weight": weight})
        assert load_adapter(path, base=base).base_digests == {"fc.weight": weight_digest(weight)}
        with pytest.raises(BaseMismatch):
            load_adapter(path, base=Base("fc"))

    def test_a_method_nobody_heard_of_is_not_all_overrides(self, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match="peft_type 'LORA' without any"):
            load_adapter(peft(tmp_path, {"fc.nova_A": ones(2, 8)}))
        path = peft(tmp_path, {"fc.nova_A": ones(2, 8)}, peft_type="NOVA")
        with pytest.raises(FormatError, match="peft_type 'NOVA'"):
            load_adapter(path)

    @pytest.mark.parametrize("extra", ["fc.lora_C.weight", "fc.lora_B.scale", "fc.gate", "fc.lora.deep.bias"])
    def test_what_stands_beside_a_modules_tensors_is_named(self, tmp_path: Path, extra: str) -> None:
        with pytest.raises(FormatError, match=rf"tensor 'base_model.model.{extra}'.*'fc' is adapted"):
            load_adapter(peft(tmp_path, lora("fc") | {extra: ones(2)}))

    def test_left_over_tensors_of_a_module_are_named(self, tmp_path: Path) -> None:
        path = file(tmp_path, kohya("lycoris_fc") | {"lycoris_fc.lora_A.weight": ones(8)})
        with pytest.raises(FormatError, match=r"'lycoris_fc'.*'lora_A.weight'"):
            load_adapter(path)

    @pytest.mark.parametrize("key", ["head.weight", "nothing", "lycoris_fd.lora_sideways.weight"])
    def test_a_tensor_of_no_format_in_a_file_is_named(self, tmp_path: Path, key: str) -> None:
        with pytest.raises(FormatError, match=rf"tensor '{key}'.*a name that none of them has"):
            load_adapter(file(tmp_path, kohya("lycoris_fc") | {key: ones(2)}))

    def test_several_formats_in_one_file(self, tmp_path: Path) -> None:
        loha = {f"lycoris_one.hada_w{i}_a": ones(8, 2) for i in (1, 2)}
        loha |= {f"lycoris_one.hada_w{i}_b": ones(2, 8) for i in (1, 2)}
        path = file(tmp_path, kohya("lycoris_two") | loha | {"lycoris_three.diff": ones(8, 8)})
        adapter = load_adapter(path, base=Base("one", "two", "three"))
        assert set(adapter.deltas) == {"one.weight", "two.weight", "three.weight"}

    def test_a_module_twice(self, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match=r"'fc.weight' is changed twice"):
            load_adapter(file(tmp_path, kohya("fc") | kohya("lycoris_fc")), base=Base("fc"))
        twice = {"fc.lora_A.weight": ones(2, 8), "base_model.model.fc.lora_A.weight": ones(2, 8)}
        with pytest.raises(FormatError, match=r"it is there without 'base_model.model.' too"):
            load_adapter(file(tmp_path, twice), scale=1.0)

    def test_a_larger_low_rank_form_is_kept_dense_with_a_note(self, tmp_path: Path) -> None:
        path = peft(tmp_path, lora("fc", 3, 3) | lora("wide", 64, 64))
        adapter = load_adapter(path)
        assert adapter.deltas["fc.weight"].factors == (None, None)
        assert adapter.deltas["wide.weight"].ranks == (2, 2)
        assert "dense" in adapter.notes["fc.weight"]
        assert set(adapter.notes) == {"fc.weight"}
        np.testing.assert_allclose(adapter.deltas["fc.weight"].dense(), 4 * ones(3, 3))

    def test_a_change_of_nothing_is_noted(self, tmp_path: Path) -> None:
        tensors = lora("fc", 64, 64)
        tensors["fc.lora_B.weight"] *= 0
        assert "changes nothing" in load_adapter(peft(tmp_path, tensors)).notes["*"]

    def test_reading_never_makes_a_change_dense(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from benchmarks.load_adapter import names_only, write_all

        files = write_all(tmp_path)
        calls: list[object] = []
        monkeypatch.setattr(TuckerDelta, "dense", calls.append)
        monkeypatch.setattr(TuckerDelta, "absorb", lambda self, modes=None: calls.append(self))
        for name, path in files.items():
            adapter = load_adapter(path, base=names_only() if name == "locon" else None)
            assert len(adapter.deltas) == 72
        assert not calls


class TestScale:
    def test_needed_and_missing(self, tmp_path: Path) -> None:
        path = file(tmp_path, lora("fc"))
        with pytest.raises(FormatError, match="scale="):
            load_adapter(path)
        assert load_adapter(path, scale=0.5).deltas["fc.weight"].dense()[0, 0] == 1.0

    def test_given_and_not_needed(self, tmp_path: Path) -> None:
        for path in (peft(tmp_path / "peft", lora("fc")), file(tmp_path, kohya("lycoris_fc"))):
            with pytest.raises(FormatError, match="Leave scale out"):
                load_adapter(path, scale=1.0)

    @pytest.mark.parametrize("scale", [float("nan"), float("inf")])
    def test_not_finite(self, tmp_path: Path, scale: float) -> None:
        with pytest.raises(FormatError, match="a finite scale"):
            load_adapter(file(tmp_path, lora("fc")), scale=scale)


class TestNames:
    @pytest.mark.parametrize("prefix", ["", "base_model.model.", "diffusion_model.", "transformer.", "model.model."])
    def test_dotted_prefixes_are_stripped_where_the_rest_is_in_the_base(self, tmp_path: Path, prefix: str) -> None:
        path = file(tmp_path, kohya(f"{prefix}blocks.0.to_q"))
        assert set(load_adapter(path, base=Base("blocks.0.to_q")).deltas) == {"blocks.0.to_q.weight"}

    def test_a_prefix_that_is_the_bases_own_stays(self, tmp_path: Path) -> None:
        base = Base("transformer.h", "h")
        assert set(load_adapter(file(tmp_path, kohya("transformer.h")), base=base).deltas) == {"transformer.h.weight"}

    @pytest.mark.parametrize("prefix", ["lycoris", "lora_unet", "lora_te", "lora_te1", "lora_te2"])
    def test_underscores_are_resolved_against_the_base(self, tmp_path: Path, prefix: str) -> None:
        path = file(tmp_path, kohya(f"{prefix}_blocks_0_to_q"))
        assert set(load_adapter(path, base=Base("blocks.0.to_q")).deltas) == {"blocks.0.to_q.weight"}
        with pytest.raises(FormatError, match=r"'" + prefix + r"_blocks_0_to_q'.*Give base="):
            load_adapter(path)
        with pytest.raises(UnknownTarget, match=r"a module of Base that is called 'blocks_0_to_q'"):
            load_adapter(path, base=Base("blocks.1.to_q"))

    def test_colliding_names_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match=r"got a.b_c, a_b.c, which the file calls by one name"):
            load_adapter(file(tmp_path, kohya("lycoris_a_b_c")), base=Base("a.b_c", "a_b.c"))

    def test_a_single_word_needs_no_base(self) -> None:
        assert Names("a test").module("lycoris_fc") == "fc"
        assert Names("a test").module("base_model.model.a.base_layer.b") == "a.b"


class TestBase:
    def test_shapes_and_names_are_checked(self, tmp_path: Path) -> None:
        path = peft(tmp_path, lora("fc", 16, 8))
        with pytest.raises(ShapeError):
            load_adapter(path, base=Base("fc"))
        with pytest.raises(UnknownTarget, match="Did you mean"):
            load_adapter(path, base=Base("fb"))

    def test_an_onnx_file(self, tmp_path: Path) -> None:
        import onnx_ir as ir

        module, path = Base("fc", "other"), tmp_path / "base.onnx"
        values = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
        initializers = [ir.Value(name=n, const_value=ir.tensor(a, name=n)) for n, a in values.items()]
        graph = ir.Graph([], [], nodes=[], initializers=initializers, opset_imports={"": 20}, name="base")
        ir.save(ir.Model(graph, ir_version=10), path)
        base = view(path)
        for name, array in values.items():
            np.testing.assert_array_equal(base.weights[name], array)
        adapter = load_adapter(file(tmp_path, kohya("lycoris_fc")), base=path)
        assert set(adapter.deltas) == {"fc.weight"}
        with pytest.raises(UnknownTarget):
            load_adapter(file(tmp_path, kohya("lycoris_fd_c")), base=str(path))

    def test_values_are_read_when_asked_for(self) -> None:
        base = view(nn.Linear(2, 3).to(torch.bfloat16))
        assert isinstance(base.weights, Lazy)
        assert base.weights["weight"].dtype == np.float32
        assert (len(base.weights), "weight" in base.weights, "w" in base.weights) == (2, True, False)
        with pytest.raises(KeyError):
            base.weights["w"]

    def test_what_is_no_base(self, tmp_path: Path) -> None:
        path = peft(tmp_path, lora("fc"))
        (tmp_path / "broken.onnx").write_bytes(b"\xff\xff")
        wrapped = Base("fc")
        wrapped.peft_config = {}  # type: ignore[assignment]
        for base, problem in (
            (3, "torch module or the path of an ONNX file"),
            ("model.pt", "package.module:factory, an .onnx file, or"),
            ("nowhere.onnx", "no such file"),
            (tmp_path / "broken.onnx", "an ONNX model"),
            (wrapped, "PEFT has wrapped"),
        ):
            with pytest.raises((FormatError, UnsupportedBase), match=problem):
                load_adapter(path, base=base)


class TestHostileHeaders:
    @pytest.mark.parametrize(
        "header",
        [
            b"{",
            b"[]",
            b"null",
            b'{"a":' * 100_000,
            b'{"a":1}',
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}',
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"x":1}}',
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":[1]}',
            b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}',
            b'{"a":{"dtype":"F32","shape":7,"data_offsets":[0,4]}}',
        ],
    )
    def test_damaged_headers(self, tmp_path: Path, header: bytes) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
        with pytest.raises(FormatError, match="complete safetensors file"):
            load_adapter(path)

    @pytest.mark.parametrize("text", ["[" * 100_000, '{"peft_type":' * 100_000, '{"r": 1, "r": 2}', "{", "[]"])
    def test_damaged_configs(self, tmp_path: Path, text: str) -> None:
        path = peft(tmp_path, lora("fc"))
        (path / "adapter_config.json").write_text(text)
        with pytest.raises(FormatError, match=r"adapter_config\.json"):
            load_adapter(path)
