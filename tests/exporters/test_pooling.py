from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.server.encoder_bundles import sentence_transformer
from tpeft_deploy import Component, export_bundle
from tpeft_deploy.bundle.text_files import Pooling
from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.components import find_components
from tpeft_deploy.exporters.pooling import most_tokens, read_pooling


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.line = nn.Linear(4, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.line(self.table(input_ids))
        return found


@pytest.mark.parametrize(
    ("files", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, Pooling("mean")),
        ({"pooling_mode_cls_token": True}, Pooling("cls")),
        ({"pooling_mode_lasttoken": True}, Pooling("last")),
        ({"pooling_mode": "lasttoken"}, Pooling("last")),
    ],
)
def test_pooling_is_that_of_sentence_transformers(tmp_path: Path, files: dict[str, Any], pooling: Pooling) -> None:
    assert read_pooling(tmp_path) is None
    (tmp_path / "config.json").write_text('{"matryoshka_dimensions": [8, 4]}')
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    sentence_transformer(tmp_path, files, **prompts)
    wanted = Pooling(pooling.mode, prompt="query: ", dimensions=(8, 4))
    assert read_pooling(tmp_path) == wanted
    assert read_pooling(tmp_path, "cls") == Pooling("cls")
    assert read_pooling(tmp_path, Pooling("last", normalize=False)) == Pooling("last", normalize=False)
    (tmp_path / "modules.json").write_text('[{"path": "1_Pooling", "type": "x.Pooling"}]')
    assert read_pooling(tmp_path) == Pooling(pooling.mode, False, "query: ", (8, 4))


@pytest.mark.parametrize(
    ("pooling", "name", "content", "told"),
    [
        ({"pooling_mode_max_tokens": True}, None, None, "its pooling is pooling_mode_max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, None, None, "its pooling is"),
        ({"pooling_mode_cls_token": True}, "modules.json", [{"path": "2_Dense", "type": "x.Dense"}], "module Dense"),
        ({"pooling_mode_cls_token": True}, "modules.json", [{"path": "", "type": "x.Transformer"}], "missing"),
        ({"pooling_mode_cls_token": True}, "sentence_bert_config.json", {"do_lower_case": True}, "lower case"),
    ],
)
def test_other_ways_to_embed_are_left_out(
    tmp_path: Path, pooling: Any, name: str | None, content: Any, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    sentence_transformer(tmp_path, pooling)
    if name is not None:
        (tmp_path / name).write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, "tpeft_deploy.exporters"):
        assert read_pooling(tmp_path) is None
    assert told in caplog.text


def test_one_component_that_reads_tokens_takes_the_pooling(tmp_path: Path) -> None:
    tokens = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    parts = {"text": Component(Table(), tokens), "image": Component(nn.Linear(4, 4), {"input": torch.randn(2, 4)})}
    found = find_components(parts, pooling="cls")
    assert found is not None
    assert [own.pooling for own in found.values()] == ["cls", None]
    with pytest.raises(UnsupportedBase, match="an output 'last_hidden_state'"):
        export_bundle(parts, {}, tmp_path / "b", pooling="mean")
    with pytest.raises(UnsupportedBase, match="one that reads input_ids, got text, more"):
        find_components({**parts, "more": parts["text"]}, pooling="cls")


def test_what_is_no_pooling_or_no_json_is_refused(tmp_path: Path) -> None:
    wrong: Any = "max"
    with pytest.raises(UnsupportedBase, match="one of cls, mean, last"):
        read_pooling(tmp_path, wrong)
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(UnsupportedBase, match="expected JSON"):
        read_pooling(tmp_path)


def test_the_least_limit_of_tokens_holds(tmp_path: Path) -> None:
    def written(name: str, **content: Any) -> int | None:
        (tmp_path / name).write_text(json.dumps(content))
        return most_tokens(tmp_path)

    assert most_tokens(tmp_path) is None
    assert written("tokenizer_config.json", model_max_length=1e30) is None
    assert written("config.json", max_position_embeddings=514) == 514
    assert written("config.json", max_position_embeddings=514, model_type="roberta", pad_token_id=1) == 512
    assert written("tokenizer_config.json", model_max_length=384) == 384
    assert written("sentence_bert_config.json", max_seq_length=256) == 256
