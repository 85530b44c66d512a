from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftType, PsoftConfig

from tests.helpers.formats.pefts import change_config, error_of, peft_model, refusal, save, vision
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.peft.refusals import refuse

READ = {"LORA", "ADALORA", "LOHA", "LOKR", "VERA", "PVERA", "TINYLORA", "IA3", "DELORA", "MISS"}
READ |= {"RANDLORA", "C3A", "FOURIERFT", "WAVEFT", "VBLORA", "UNILORA", "SHIRA", "SUPERTUNING", "GRALORA"}
READ |= {"LN_TUNING", "BEFT", "TRAINABLE_TOKENS"}
READ |= {"OFT", "BOFT", "HRA", "HIRA", "ROAD", "GLORA", "DEFT", "OSF", "PEANUT", "FROD"}


def message(**config: Any) -> str:
    with pytest.raises(FormatError) as caught:
        refuse(config, "some/adapter")
    text = str(caught.value)
    assert "\n" not in text
    assert "read some/adapter: expected an adapter that changes weights, got " in text
    return text


class TestTypes:
    @pytest.mark.parametrize("kind", sorted({kind.value for kind in PeftType} - READ))
    def test_every_other_type_of_peft_is_refused_with_a_reason(self, kind: str) -> None:
        text = message(peft_type=kind)
        assert f"peft_type {kind!r}: it" in text  # and not merely unknown

    @pytest.mark.parametrize("kind", sorted(READ))
    def test_what_is_read_passes(self, kind: str) -> None:
        refuse({"peft_type": kind, "save_indices": True}, "some/adapter")

    def test_a_type_of_tomorrow(self) -> None:
        assert "this version does not support it" in message(peft_type="LORA_NEXT")

    def test_files_without_a_configuration_pass(self) -> None:
        refuse({}, "some/adapter")

    @pytest.mark.parametrize(
        "config",
        [
            PsoftConfig(target_modules=["fc"], r=4),
        ],
        ids=lambda config: config.peft_type.value,
    )
    def test_what_peft_saved(self, tmp_path: Path, config: Any) -> None:
        base, _ = vision()
        assert f"{config.peft_type.value!r}" in refusal(save(peft_model(base, config), tmp_path), base)


class TestFields:
    @pytest.mark.parametrize(
        ("field", "value", "reason"),
        [
            ("use_qalora", True, "pools the input"),
            ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
            ("alora_invocation_tokens", [1, 2], "middle of a sequence"),
            ("arrow_config", {"top_k": 2}, "routes"),
            ("kasa_config", {"beta": 1}, "changes the base weight"),
            ("monteclora_config", {"num_samples": 2}, "samples"),
            ("velora_config", {"scale": 1}, "VeLoRA"),
            ("layer_replication", [[0, 2]], "repeats layers"),
            ("megatron_config", {"a": 1}, "Megatron"),
        ],
    )
    def test_refused_only_where_they_are_set(self, field: str, value: Any, reason: str) -> None:
        text = message(peft_type="LORA", **{field: value})
        assert f"{field} in adapter_config.json" in text
        assert reason in text
        off: Any
        for off in (None, False, [], {}):
            refuse({"peft_type": "LORA", field: off}, "some/adapter")

    @pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
    def test_inits_that_move_the_base_by_an_unknown_amount(self, init: str) -> None:
        text = message(peft_type="LORA", init_lora_weights=init)
        assert f"init_lora_weights={init!r}" in text
        assert "the base weight" in text

    def test_an_init_of_tomorrow(self) -> None:
        assert "does not support it" in message(peft_type="LORA", init_lora_weights="next")

    @pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva", "mica", "pissa", "olora"])
    def test_inits_that_pass(self, init: Any) -> None:
        refuse({"peft_type": "LORA", "init_lora_weights": init}, "some/adapter")

    @pytest.mark.parametrize("init", ["gaussian", "orthogonal", "mica"])
    def test_inits_that_leave_the_base_as_it_is(self, tmp_path: Path, init: str) -> None:
        base, x = vision()
        error, adapter = error_of(base, x, LoraConfig(r=4, target_modules=["fc"], init_lora_weights=init), tmp_path)
        assert error < 2e-5
        assert adapter.deltas["fc.weight"].ranks == (4, 4)

    def test_through_the_loader(self, tmp_path: Path) -> None:
        base, _ = vision()
        save(peft_model(base, LoraConfig(r=4, target_modules=["fc"])), tmp_path)
        assert "Merge it with PEFT" in refusal(change_config(tmp_path, layer_replication=[[0, 1]]), base)
