import json
import math
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from tpeft_deploy.training import TuckerConfig
from tpeft_deploy.training.config import mode_ranks


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ranks", 0),
        ("ranks", -1),
        ("ranks", True),
        ("ranks", 1.5),
        ("ranks", 0.0),
        ("ranks", math.nan),
        ("ranks", "8"),
        ("ranks", []),
        ("ranks", [8, 0]),
        ("ranks", [8, None]),
        ("rank_pattern", {"stem": -2}),
        ("rank_pattern", {"stem": []}),
        ("rank_pattern", {"(": 2}),
        ("scale", math.inf),
        ("scale", math.nan),
        ("scale", "1"),
        ("scale", True),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", math.nan),
        ("init_weights", "gaussian"),
        ("ensure_weight_tying", "yes"),
        ("base_digests", {"stem.weight": 5}),
        ("layers_pattern", "layers"),
        ("task_type", "NO_TASK"),
    ],
)
def test_a_field_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field.replace("_", ".")):
        TuckerConfig(**{field: value})


def test_layer_numbers_need_a_list_of_targets() -> None:
    with pytest.raises(ValueError, match="layers_to_transform"):
        TuckerConfig(target_modules=".*query", layers_to_transform=[0])


@pytest.mark.parametrize(
    ("ranks", "shape", "expected"),
    [
        (8, (768, 64), (8, 8)),
        (8, (768, 4), (8, 4)),
        (8, (32, 16, 3, 5), (8, 8, 3, 5)),
        (8, (6, 1, 7), (6, 1, 7)),
        (0.5, (32, 16, 3), (16, 8, 3)),
        (0.01, (32, 16), (1, 1)),
        (1.0, (32, 16), (32, 16)),
        ([4], (32, 16, 3), (4, 16, 3)),
        ([4, 0.25, 2], (32, 16, 3, 3), (4, 4, 2, 3)),
        ([4, 4, 1.0, 9], (32, 16, 3, 3), (4, 4, 3, 3)),
    ],
)
def test_ranks_of_a_weight(ranks: Any, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert mode_ranks(ranks, shape) == expected


def test_more_ranks_than_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 2 ranks"):
        mode_ranks([8, 8, 3], (32, 16))


def test_json_round_trip_is_exact(tmp_path: Path) -> None:
    config = TuckerConfig(
        ranks=[8, 0.3, 2],
        rank_pattern={r"layer\.\d+\.query": 0.1, "stem": [4, 4]},
        scale=4 / 3,
        dropout=0.1,
        target_modules=["stem", "query", "value"],
        exclude_modules=["head"],
        layers_to_transform=[0, 2],
        layers_pattern="layer",
        modules_to_save=["head"],
        base_digests={"stem.weight": "ab" * 32},
    )
    config.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stated["peft_type"] == "TPEFT_TUCKER"
    assert (stated["ranks"], stated["scale"], stated["base_digests"]) == (config.ranks, 4 / 3, config.base_digests)
    assert stated["target_modules"] == ["query", "stem", "value"]
    read = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(read, TuckerConfig)
    assert read == config
