"""What training leans on inside PEFT, none of it documented: a release that moves it fails here first."""

import inspect
import subprocess
import sys

import pytest
from peft import PeftConfig, PeftModel, PeftType, mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import get_pattern_key
from torch import nn

from tpeft_deploy.errors import MissingExtra
from tpeft_deploy.training import PEFT_TYPE, TuckerConfig, TuckerLayer, TuckerModel
from tpeft_deploy.training.registration import register


def test_look_up_tables() -> None:
    tables = {
        "PEFT_TYPE_TO_CONFIG_MAPPING": (TuckerConfig, PeftConfig),
        "PEFT_TYPE_TO_TUNER_MAPPING": (TuckerModel, BaseTuner),
    }
    for name, (ours, kind) in tables.items():
        table = getattr(mapping, name)
        assert type(table) is dict
        assert table[PEFT_TYPE] is ours
        assert issubclass(table[PeftType.LORA], kind)
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] == "tucker_"
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA] == "lora_"


def test_types_are_looked_up_as_text() -> None:
    assert issubclass(PeftType, str)
    assert hash(PeftType.LORA) == hash("LORA")
    assert "LORA" in mapping.PEFT_TYPE_TO_TUNER_MAPPING
    assert PEFT_TYPE not in list(PeftType), "upstream has taken the name"


def test_registering_again_changes_nothing() -> None:
    before = dict(mapping.PEFT_TYPE_TO_TUNER_MAPPING)
    register()
    assert before == mapping.PEFT_TYPE_TO_TUNER_MAPPING


def test_tuner_hooks() -> None:
    assert BaseTuner.__abstractmethods__ == {"_create_and_replace"}
    hooks = {
        "inject_adapter": ["self", "model", "adapter_name"],
        "_prepare_adapter_config": ["self", "peft_config", "model_config"],
        "_replace_module": ["self", "parent", "child_name", "new_module", "child"],
    }
    for name, parameters in hooks.items():
        assert list(inspect.signature(getattr(BaseTuner, name)).parameters)[: len(parameters)] == parameters
    assert "current_key" in inspect.signature(BaseTuner._create_and_replace).parameters
    assert "_enable_peft_forward_hooks" in inspect.getsource(PeftModel._enable_peft_forward_hooks)
    assert not hasattr(BaseTuner, "_enable_peft_forward_hooks")


def test_layer_hooks() -> None:
    assert not BaseTunerLayer.__abstractmethods__
    for name in ("weight", "merged", "disable_adapters", "active_adapters"):
        assert isinstance(inspect.getattr_static(BaseTunerLayer, name), property)
    for name in ("_move_adapter_to_device_of_base_layer", "_cast_input_dtype", "set_adapter", "delete_adapter"):
        assert callable(getattr(BaseTunerLayer, name))
    for name in ("merge", "unmerge"):
        theirs = list(inspect.signature(getattr(BaseTunerLayer, name)).parameters)
        assert list(inspect.signature(getattr(TuckerLayer, name)).parameters) == theirs
    assert list(inspect.signature(check_adapters_to_merge).parameters) == ["module", "adapter_names"]
    assert get_pattern_key(["query"], "layer.0.query") == "query"
    assert get_pattern_key(["query"], "layer.0.value") == "layer.0.value"


def test_torch_convolutions_run_any_weight() -> None:
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        assert list(inspect.signature(kind._conv_forward).parameters) == ["self", "input", "weight", "bias"]


@pytest.mark.parametrize("package", ["torch", "peft"])
def test_a_missing_extra_says_what_to_install(package: str) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None
from tpeft_deploy.errors import MissingExtra
try:
    import tpeft_deploy.training
except MissingExtra as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "expected peft and torch to be installed" in done.stdout
    assert package in done.stdout.partition("got ")[2]
    assert "pip install 'tpeft-deploy[train]'" in done.stdout
    assert issubclass(MissingExtra, Exception)
