"""An adapter fits one base: recorded when it is injected, checked when it is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.errors import BaseMismatch, UnknownTarget
from tpeft_deploy.training import TuckerConfig


def config() -> TuckerConfig:
    return TuckerConfig(ranks=2, target_modules=["stem", "hidden"], modules_to_save=["head"], init_weights=False)


def test_targets_are_recorded_by_their_base_name(make_net: Callable[[], Any]) -> None:
    base = make_net()
    expected = {
        name: weight_digest(base.get_parameter(name).detach().numpy()) for name in ("stem.weight", "hidden.weight")
    }
    model = get_peft_model(base, config())
    assert model.peft_config["default"].base_digests == expected


def test_sixteen_bit_bases_have_the_digest_of_their_values(make_net: Callable[[], Any]) -> None:
    base = make_net().to(torch.bfloat16)
    expected = weight_digest(base.stem.weight.detach().float().numpy())
    model = get_peft_model(base, config())
    assert model.peft_config["default"].base_digests["stem.weight"] == expected


def test_the_users_object_stays_as_it_is(make_net: Callable[[], Any]) -> None:
    mine = config()
    get_peft_model(make_net(), mine)
    assert not mine.base_digests
    other = make_net()
    torch.nn.init.normal_(other.stem.weight)
    get_peft_model(other, mine)


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning")
def test_training_and_merging_change_no_digest(make_net: Callable[[], Any], tmp_path: Path) -> None:
    model = get_peft_model(make_net(), config())
    recorded = dict(model.peft_config["default"].base_digests)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    model.load_adapter(tmp_path, "while-merged")
    assert model.peft_config["while-merged"].base_digests == recorded
    model.unmerge_adapter()
    model.load_adapter(tmp_path, "unmerged")
    model.add_adapter("new", config())
    assert model.peft_config["new"].base_digests == recorded


def test_another_base_is_refused_before_it_is_touched(make_net: Callable[[], Any], ids: Tensor, tmp_path: Path) -> None:
    get_peft_model(make_net(), config()).save_pretrained(tmp_path)
    other = make_net()
    with torch.no_grad():
        other.hidden.weight[0, 0] += 1e-3
    output = other(ids)
    with pytest.raises(BaseMismatch, match=r"'hidden.weight': .*another base.*expected base weight") as caught:
        PeftModel.from_pretrained(other, tmp_path)
    assert "\n" not in str(caught.value)
    assert torch.equal(other(ids), output)
    assert not any("tucker" in name for name in other.state_dict())


def test_a_second_adapter_of_another_base_is_refused(make_net: Callable[[], Any], tmp_path: Path) -> None:
    other = make_net()
    torch.nn.init.normal_(other.stem.weight)
    get_peft_model(other, config()).save_pretrained(tmp_path)
    model = get_peft_model(make_net(), config())
    with pytest.raises(BaseMismatch, match=r"adapter 'second' .*'stem.weight'"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]


def test_other_heads_and_untargeted_weights_do_not_matter(make_net: Callable[[], Any], tmp_path: Path) -> None:
    get_peft_model(make_net(), config()).save_pretrained(tmp_path)
    other = make_net()
    torch.nn.init.normal_(other.head.weight)
    PeftModel.from_pretrained(other, tmp_path)


def test_a_base_without_the_weight_is_refused(make_net: Callable[[], Any], tmp_path: Path) -> None:
    get_peft_model(make_net(), config()).save_pretrained(tmp_path)
    other = make_net()
    other.hidden = torch.nn.Identity()
    with pytest.raises(UnknownTarget, match=r"'hidden.weight'"):
        PeftModel.from_pretrained(other, tmp_path)


def test_a_base_on_the_meta_device_records_nothing(make_net: Callable[[], Any], tmp_path: Path) -> None:
    model = get_peft_model(make_net().to("meta"), config())
    assert model.peft_config["default"].base_digests == {}
    get_peft_model(make_net(), config()).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_net().to("meta"), tmp_path, low_cpu_mem_usage=True)
    assert set(loaded.peft_config["default"].base_digests) == {"stem.weight", "hidden.weight"}
