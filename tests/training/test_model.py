from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from tpeft_deploy.training import TuckerConfig, TuckerLayer, TuckerModel

TARGETS = ["embed", "stem", "depthwise", "hidden"]
deleted_the_active = pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")


def config(**options: Any) -> TuckerConfig:
    defaults: dict[str, Any] = {"ranks": 3, "scale": 2.0, "target_modules": TARGETS, "init_weights": False}
    return TuckerConfig(**(defaults | options))


def adapters(model: nn.Module) -> dict[str, TuckerLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TuckerLayer)}


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


class TestStart:
    def test_output_is_the_base(self, make_net: Callable[[], Any], ids: Tensor) -> None:
        model = get_peft_model(make_net(), config(init_weights=True)).eval()
        assert torch.equal(model(ids), make_net()(ids))
        assert isinstance(model.base_model, TuckerModel)

    def test_only_adapters_and_saved_modules_are_trained(self, make_net: Callable[[], Any], ids: Tensor) -> None:
        model = get_peft_model(make_net(), config(modules_to_save=["head"]))
        model(ids).sum().backward()
        for name, parameter in model.named_parameters():
            trained = ".tucker_" in name or ".modules_to_save." in name
            assert parameter.requires_grad == trained, name
            assert (parameter.grad is not None) == trained, name

    def test_training_reduces_the_loss_and_leaves_the_base(self, make_net: Callable[[], Any], ids: Tensor) -> None:
        model = get_peft_model(make_net(), config(init_weights=True))
        before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        wanted = torch.randn(4, 3)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        losses = []
        for _ in range(60):
            loss = (model(ids) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.2 * losses[0]
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)

    def test_rank_pattern_and_lists(self, make_net: Callable[[], Any]) -> None:
        model = get_peft_model(make_net(), config(ranks=2, rank_pattern={"stem": [4, 0.5, 2], "hid.*": 5}))
        ranks = {
            name.rpartition(".")[2]: tuple(layer.tucker_core["default"].shape)
            for name, layer in adapters(model).items()
        }
        assert ranks == {"embed": (2, 2), "stem": (4, 4, 2), "depthwise": (2, 1, 3), "hidden": (5, 5)}

    def test_all_linear_and_exclusion(self, make_net: Callable[[], Any]) -> None:
        model = get_peft_model(make_net(), config(target_modules="all-linear", exclude_modules=["head"]))
        assert [name.rpartition(".")[2] for name in adapters(model)] == ["hidden"]

    def test_layers_to_transform(self) -> None:
        base = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(3))})
        tuner = TuckerModel(
            base,
            {"default": config(target_modules=["fc"], layers_to_transform=[0, 2], layers_pattern="layers")},
            "default",
        )
        assert sorted(tuner.targeted_module_names) == ["layers.0.fc", "layers.2.fc"]


class TestVerbs:
    def test_save_and_from_pretrained(self, make_net: Callable[[], Any], ids: Tensor, tmp_path: Path) -> None:
        model = get_peft_model(make_net(), config(modules_to_save=["head"])).eval()
        nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
        model.save_pretrained(tmp_path)
        for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
            loaded = PeftModel.from_pretrained(make_net(), tmp_path, **options).eval()
            assert torch.equal(loaded(ids), model(ids))
            trained = [name for name, p in loaded.named_parameters() if p.requires_grad]
            assert bool(trained) == ("is_trainable" in options)
            assert not any(p.is_meta for p in loaded.parameters())

    def test_several_adapters(self, make_net: Callable[[], Any], ids: Tensor, tmp_path: Path) -> None:
        outputs = {}
        for name, targets in {"a": TARGETS, "b": ["stem", "head"]}.items():
            torch.manual_seed(ord(name))
            model = get_peft_model(make_net(), config(target_modules=targets, ranks=2 + (name == "b"))).eval()
            outputs[name] = model(ids)
            model.save_pretrained(tmp_path / name)
        model = PeftModel.from_pretrained(make_net(), tmp_path / "a", adapter_name="a").eval()
        model.load_adapter(tmp_path / "b", "b", low_cpu_mem_usage=True)
        assert torch.equal(model(ids), outputs["a"])
        model.set_adapter("b")
        assert torch.equal(model(ids), outputs["b"])
        with model.disable_adapter():
            assert torch.equal(model(ids), make_net()(ids))
        model.set_adapter("a")
        assert torch.equal(model(ids), outputs["a"])
        model.base_model.set_adapter(["a", "b"])
        both = model(ids)
        assert close(model.merge_and_unload(adapter_names=["a", "b"])(ids), both)

    @deleted_the_active
    def test_add_and_delete(self, make_net: Callable[[], Any], ids: Tensor) -> None:
        model = get_peft_model(make_net(), config()).eval()
        first = model(ids)
        model.add_adapter("second", config(ranks=2))
        assert torch.equal(model(ids), first)
        model.set_adapter("second")
        second = model(ids)
        assert not close(second, first)
        model.delete_adapter("default")
        assert torch.equal(model(ids), second)
        assert not any(".default" in name for name in model.state_dict())

    def test_merge_and_unmerge(self, make_net: Callable[[], Any], ids: Tensor) -> None:
        model = get_peft_model(make_net(), config()).eval()
        adapted = model(ids)
        for _ in range(2):
            model.merge_adapter(safe_merge=True)
            assert close(model(ids), adapted)
            model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(ids), make_net()(ids))
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(ids), make_net()(ids))
        assert torch.equal(model(ids), adapted)

    def test_merge_and_unload(self, make_net: Callable[[], Any], ids: Tensor) -> None:
        model = get_peft_model(make_net(), config()).eval()
        adapted = model(ids)
        merged = model.merge_and_unload(safe_merge=True)
        assert type(merged) is type(make_net())
        assert not adapters(merged)
        assert merged.state_dict().keys() == make_net().state_dict().keys()
        assert close(merged(ids), adapted)

    def test_unload(self, make_net: Callable[[], Any], ids: Tensor) -> None:
        base = get_peft_model(make_net(), config()).unload()
        assert not adapters(base)
        assert torch.equal(base(ids), make_net()(ids))

    def test_inject_and_state_dicts(self, make_net: Callable[[], Any], ids: Tensor) -> None:
        first = inject_adapter_in_model(config(), make_net()).eval()
        state = get_peft_model_state_dict(first)
        assert sorted(key for key in state if key.startswith("stem")) == [
            "stem.tucker_core",
            "stem.tucker_factor.0",
            "stem.tucker_factor.1",
        ]
        for low in (False, True):
            second = inject_adapter_in_model(config(), make_net(), state_dict=state, low_cpu_mem_usage=low).eval()
            result = set_peft_model_state_dict(second, state, low_cpu_mem_usage=low)
            assert not result.unexpected_keys
            assert torch.equal(second(ids), first(ids))

    def test_half_precision_base_trains_float32_adapters(self, make_net: Callable[[], Any], ids: Tensor) -> None:
        model = get_peft_model(make_net().to(torch.bfloat16), config())
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert model(ids).dtype == torch.bfloat16
        kept = get_peft_model(make_net().to(torch.bfloat16), config(), autocast_adapter_dtype=False)
        assert {p.dtype for p in kept.parameters() if p.requires_grad} == {torch.bfloat16}
        assert kept(ids).dtype == torch.bfloat16

    def test_autocast(self, make_net: Callable[[], Any], ids: Tensor) -> None:
        model = get_peft_model(make_net(), config())
        exact = model.eval()(ids)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(ids)
        assert torch.allclose(rounded.float(), exact, atol=0.1)


class TestSharing:
    def test_a_module_used_twice_is_adapted_and_restored_in_both_places(self, tmp_path: Path) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(3)
                self.first = nn.Linear(4, 4)
                self.second = nn.Sequential(self.first)

            def forward(self, x: Tensor) -> Tensor:
                output: Tensor = self.second(self.first(x))
                return output

        x = torch.randn(2, 4)
        model = get_peft_model(Twice(), config(target_modules=["first"], ranks=2)).eval()
        adapted = model(x)
        base = model.base_model.model
        assert base.first is base.second[0]
        model.save_pretrained(tmp_path)
        for low in (False, True):
            assert torch.equal(PeftModel.from_pretrained(Twice(), tmp_path, low_cpu_mem_usage=low)(x), adapted)
        merged = model.merge_and_unload()
        assert merged.first is merged.second[0]
        assert type(merged.first) is nn.Linear
        assert close(merged(x), adapted)

    def test_merging_into_a_tied_weight_unties_it(self) -> None:
        model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
        model[1].weight = model[0].weight
        ids = torch.arange(9)
        tuned = get_peft_model(model, config(target_modules=["0"]))
        nn.init.normal_(tuned.base_model.model[0].tucker_core["default"])
        adapted = tuned(ids)
        tuned.merge_adapter()
        assert close(tuned(ids), adapted)
        tuned.unmerge_adapter()
        assert tuned.base_model.model[0].base_layer.weight is model[1].weight
        assert close(tuned.merge_and_unload()(ids), adapted)


class TestRefusals:
    def test_an_unsupported_module_is_named(self, make_net: Callable[[], Any]) -> None:
        with pytest.raises(ValueError, match=r"'norm': expected one of Linear, Conv1d.*torch.nn.*BatchNorm1d"):
            get_peft_model(make_net(), config(target_modules=["norm"]))

    @pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
    def test_another_tuners_layer(self, make_net: Callable[[], Any]) -> None:
        lora = inject_adapter_in_model(LoraConfig(target_modules=["hidden"]), make_net(), adapter_name="lora")
        del lora.peft_config
        with pytest.raises(ValueError, match=r"'hidden': .*peft\.tuners\.lora"):
            get_peft_model(lora, config(target_modules=["hidden"]))

    def test_too_many_ranks_name_the_module(self, make_net: Callable[[], Any]) -> None:
        with pytest.raises(ValueError, match="'hidden': expected at most 2 ranks"):
            get_peft_model(make_net(), config(target_modules=["hidden"], ranks=[2, 2, 2]))

    def test_no_targets(self, make_net: Callable[[], Any]) -> None:
        with pytest.raises(ValueError, match="target_modules"):
            get_peft_model(make_net(), TuckerConfig())
        with pytest.raises(ValueError, match="not found"):
            get_peft_model(make_net(), TuckerConfig(target_modules=["nowhere"]))

    def test_an_adapter_called_like_a_layer_number(self, make_net: Callable[[], Any]) -> None:
        with pytest.raises(ValueError, match="adapter name '0'"):
            get_peft_model(make_net(), config(), adapter_name="0")

    def test_adapter_names_are_not_ignored(self, make_net: Callable[[], Any], ids: Tensor) -> None:
        model = get_peft_model(make_net(), config())
        with pytest.raises(ValueError, match="adapter_names"):
            model(ids, adapter_names=["default"] * 4)
