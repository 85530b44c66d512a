"""What PEFT saves is what `load_adapter` reads: the same changes, heads and statistics."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import BaseMismatch, FormatError
from tpeft_deploy.formats import load_adapter
from tpeft_deploy.training import TuckerConfig

# transformers 5 still asks PEFT's question by its old name.
old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
copies_embeddings = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")


def apply(adapter: Adapter, base: nn.Module) -> nn.Module:
    """The base with W + dW and every override in place."""
    for name, delta in adapter.deltas.items():
        weight = base.get_parameter(name)
        weight.data = (weight.data.double() + torch.from_numpy(delta.dense())).to(weight.dtype)
    for name, array in adapter.overrides.items():
        module, _, leaf = name.rpartition(".")
        getattr(base.get_submodule(module), leaf).data = torch.from_numpy(array)
    return base


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_every_kind_of_layer(case: Any, tmp_path: Path) -> None:
    base = nn.Sequential(case.layer.float())
    x = case.x.float() if case.x.is_floating_point() else case.x
    before = case.layer.weight.detach().clone()
    model = get_peft_model(
        base, TuckerConfig(ranks=case.ranks, scale=0.75, target_modules=["0"], init_weights=False)
    ).eval()
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert list(adapter.deltas) == ["0.weight"]
    expected = model.base_model.model[0].get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose(adapter.deltas["0.weight"].dense(), expected, atol=1e-6)
    adapted = model(x)
    plain = model.unload()
    assert torch.equal(plain[0].weight, before)
    torch.testing.assert_close(apply(adapter, plain)(x), adapted, rtol=1e-5, atol=1e-5)


def test_heads_and_batchnorm_statistics(make_net: Callable[[], Any], ids: Tensor, tmp_path: Path) -> None:
    base = make_net()
    base.head = nn.Linear(10, 7)
    model = get_peft_model(
        base,
        TuckerConfig(ranks=2, target_modules=["stem"], modules_to_save=["head", "norm"], init_weights=False),
    )
    model.train()(ids)
    model.eval()
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, base=make_net())
    norm = [f"norm.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    assert set(adapter.overrides) == {"head.weight", "head.bias", *norm}
    saved = model.base_model.model.head.modules_to_save["default"]
    np.testing.assert_array_equal(adapter.overrides["head.weight"], saved.weight.detach().numpy())
    assert adapter.overrides["norm.num_batches_tracked"] == 1
    assert adapter.overrides["norm.running_mean"].any()
    torch.testing.assert_close(apply(adapter, make_net())(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_second_adapters_are_saved_beside_the_first(make_net: Callable[[], Any], tmp_path: Path) -> None:
    model = get_peft_model(make_net(), TuckerConfig(ranks=2, target_modules=["stem"], init_weights=False))
    model.add_adapter("other", TuckerConfig(ranks=3, scale=3.0, target_modules=["stem", "head"], init_weights=False))
    model.save_pretrained(tmp_path)
    layer = model.base_model.model.stem
    for name, path in {"default": tmp_path, "other": tmp_path / "other"}.items():
        dense = load_adapter(path).deltas["stem.weight"].dense()
        np.testing.assert_allclose(dense, layer.get_delta_weight(name).detach().numpy(), atol=1e-6)


def test_digests_reach_the_reader(make_net: Callable[[], Any], tmp_path: Path) -> None:
    model = get_peft_model(make_net(), TuckerConfig(ranks=2, target_modules=["stem", "embed"]))
    model.save_pretrained(tmp_path)
    assert load_adapter(tmp_path).base_digests == model.peft_config["default"].base_digests
    other = make_net()
    nn.init.normal_(other.stem.weight)
    with pytest.raises(BaseMismatch, match=r"'stem\.weight'"):
        load_adapter(tmp_path, base=other)


def test_pickles_are_refused(make_net: Callable[[], Any], tmp_path: Path) -> None:
    model = get_peft_model(make_net(), TuckerConfig(ranks=2, target_modules=["stem"]))
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(FormatError, match="safe_serialization=True"):
        load_adapter(tmp_path)


@old_name
class TestTransformers:
    def test_sequence_classification_keeps_its_head(self, tmp_path: Path) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
        small = BertConfig(num_hidden_layers=2, max_position_embeddings=12, num_labels=4, **sizes)

        def build() -> Any:
            torch.manual_seed(2)
            return BertForSequenceClassification(small).eval()

        options: dict[str, Any] = {
            "target_modules": ["query", "dense", "word_embeddings"],
            "exclude_modules": ["pooler.dense"],
        }
        model = get_peft_model(
            build(), TuckerConfig(ranks=3, task_type="SEQ_CLS", init_weights=False, **options)
        ).eval()
        model.save_pretrained(tmp_path)
        adapter = load_adapter(tmp_path, base=build())
        assert set(adapter.overrides) == {"classifier.weight", "classifier.bias"}
        assert len(adapter.deltas) == 2 * 4 + 1
        words = {"input_ids": torch.randint(0, 30, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
        expected = model(**words).logits
        torch.testing.assert_close(apply(adapter, build())(**words).logits, expected, rtol=1e-5, atol=1e-5)
        again = PeftModel.from_pretrained(build(), tmp_path).eval()
        assert torch.equal(again(**words).logits, expected)

    @copies_embeddings
    def test_copies_of_adapted_embeddings_are_left_out(self, tmp_path: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
        small = LlamaConfig(num_hidden_layers=1, tie_word_embeddings=False, **sizes)
        targets = ["embed_tokens", "lm_head", "q_proj"]
        model = get_peft_model(LlamaForCausalLM(small), TuckerConfig(ranks=2, target_modules=targets))
        model.save_pretrained(tmp_path)
        adapter = load_adapter(tmp_path)
        names = {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"}
        assert set(adapter.deltas) == names
        assert not adapter.overrides
        nn.init.normal_(model.base_model.model.lm_head.tucker_core["default"])
        model.merge_adapter()
        model.save_pretrained(tmp_path / "merged")
        with pytest.raises(
            FormatError, match=r"lm_head\.base_layer\.weight.*merged into it.*save_embedding_layers=False"
        ):
            load_adapter(tmp_path / "merged")
        model.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
        assert set(load_adapter(tmp_path / "plain").deltas) == names
