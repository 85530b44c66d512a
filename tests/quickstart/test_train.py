import copy

import numpy as np
import pytest
import torch

from tpeft_deploy.quickstart.data import TASKS, Digits, load_digits
from tpeft_deploy.quickstart.model import DigitsNet
from tpeft_deploy.quickstart.train import Recipe, merged, train_adapter, train_base

TASK = {task.name: task for task in TASKS}
SHORT = Recipe(steps=3, rate=1e-2, decay=0.01)


@pytest.fixture(scope="module")
def train() -> Digits:
    return load_digits(0)[0]


@pytest.fixture(scope="module")
def base(train: Digits) -> DigitsNet:
    return train_base(train, seed=0, recipe=Recipe(steps=40, rate=6e-3, decay=0.05))


def test_forty_steps_already_teach_the_base(base: DigitsNet) -> None:
    test = load_digits(0)[1]
    with torch.inference_mode():
        right = base(torch.from_numpy(test.pixels))["logits"].argmax(1).numpy() == test.labels
    assert right.mean() > 0.5
    assert not base.training


def test_weights_are_contiguous_as_files_want_them(base: DigitsNet) -> None:
    assert all(weight.is_contiguous() for weight in base.state_dict().values())


@pytest.mark.parametrize("name", TASK)
def test_an_adapter_leaves_the_base_alone_and_changes_every_kind_of_weight(
    name: str, base: DigitsNet, train: Digits
) -> None:
    before = copy.deepcopy(base.state_dict())
    adapted = merged(train_adapter(base, TASK[name], train, seed=0, recipe=SHORT)).state_dict()
    assert all(torch.equal(base.state_dict()[key], value) for key, value in before.items())
    changed = {
        key for key, value in adapted.items() if value.shape != before[key].shape or (value != before[key]).any()
    }
    blocks = {f"{block}.{part}.weight" for block in ("early", "late") for part in ("depthwise", "expand", "reduce")}
    head = set() if TASK[name].shares_head else {"head.weight", "head.bias"}
    assert changed == blocks | {"stem.weight", "downsample.weight"} | head
    assert adapted["head.weight"].shape[0] == len(TASK[name].answers)


def test_merging_leaves_the_peft_model_as_it_is(base: DigitsNet, train: Digits) -> None:
    adapted = train_adapter(base, TASK["upright"], train, seed=0, recipe=SHORT)
    pixels = torch.from_numpy(train.pixels[:4])
    with torch.inference_mode():
        plain = merged(adapted)(pixels=pixels)["logits"]
        torch.testing.assert_close(adapted(pixels=pixels)["logits"], plain, rtol=1e-4, atol=1e-5)
    assert any("tucker_core" in name for name, _ in adapted.named_parameters())


def test_training_is_reproducible_and_leaves_no_traces(base: DigitsNet, train: Digits) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    first, again = (train_adapter(base, TASK["inverted"], train, seed=4, recipe=SHORT) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    weights = dict(again.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in first.named_parameters())


def test_effort_scales_steps_down_to_two() -> None:
    assert Recipe(450, 1e-2, 0.01).scaled(0.5).steps == 225
    assert Recipe(450, 1e-2, 0.01).scaled(0).steps == 2


def test_pictures_are_not_changed_by_training_on_them(base: DigitsNet, train: Digits) -> None:
    before = train.pixels.copy()
    train_adapter(base, TASK["rotated"], train, seed=0, recipe=SHORT)
    assert np.array_equal(train.pixels, before)
