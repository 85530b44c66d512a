"""Models of transformers, adapted, saved and read: the wrapped model's own forward is the oracle."""

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tpeft_deploy.formats import load_adapter
from tpeft_deploy.training import TuckerConfig, TuckerLayer

IDS = torch.tensor([[1, 5, 9, 2], [7, 3, 3, 8]])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Without what PEFT and transformers say of every tied model, embedding and renamed function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def deberta() -> Any:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=3, relative_attention=True, pos_att_type=["p2c", "c2p"],
        pooler_hidden_size=16,
    )  # fmt: skip
    return DebertaV2ForSequenceClassification(config)


def whisper() -> Any:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    return WhisperEncoder(WhisperConfig(num_mel_bins=6, max_source_positions=8, **sizes))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=8))


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 30, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True, **sizes))


class Decoder(nn.Module):
    """As the upsampling half of a U-Net: the second step grows to the size of what it is joined with."""

    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, dilation=1)
        self.join = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.signal = nn.ConvTranspose1d(4, 3, 4, stride=3, output_padding=1, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.signal(self.join(self.grow(x, output_size=[8, 8]).relu()).relu().flatten(2))
        return output


def build(make: Callable[[], Any]) -> Any:
    torch.manual_seed(3)
    return make().eval()


def adapt(make: Callable[[], Any], targets: list[str], **options: Any) -> Any:
    model = build(make)
    config = TuckerConfig(ranks=3, scale=2.0, target_modules=targets, init_weights=False, **options)
    return get_peft_model(model, config).eval()


def run(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(x)
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


MODELS: dict[str, tuple[Callable[[], Any], list[str], Tensor]] = {
    "whisper": (whisper, ["conv1", "conv2", "q_proj"], torch.randn(2, 6, 16)),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"], IDS),
    "decoder": (Decoder, ["grow", "join", "signal"], torch.randn(2, 4, 4, 4)),
    "gpt2, tied head": (gpt2, ["lm_head", "c_attn"], IDS),
    "gpt2, tied embedding": (gpt2, ["wte"], IDS),
    "llama, both uses": (llama, ["embed_tokens", "lm_head"], IDS),
}


@pytest.fixture(params=MODELS)
def subject(request: pytest.FixtureRequest) -> tuple[Callable[[], Any], list[str], Tensor]:
    return MODELS[request.param]


def merged_by_reading(make: Callable[[], Any], path: Path) -> Any:
    """The base with every weight that the file names replaced in the module that it names, and nowhere else."""
    base = build(make)
    adapter = load_adapter(path, base=build(make))
    for name in adapter.deltas:
        module, _, leaf = name.rpartition(".")
        weight = base.get_parameter(name).detach()
        merged = torch.from_numpy(adapter.merged(name, weight.numpy())).to(weight.dtype)
        setattr(base.get_submodule(module), leaf, nn.Parameter(merged))
    for name, array in adapter.overrides.items():
        module, _, leaf = name.rpartition(".")
        getattr(base.get_submodule(module), leaf).data = torch.from_numpy(array)
    return base


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


class TestModels:
    def test_what_is_saved_is_what_ran(
        self, subject: tuple[Callable[[], Any], list[str], Tensor], tmp_path: Path
    ) -> None:
        make, targets, x = subject
        model = adapt(make, targets)
        adapted, plain = run(model, x), run(build(make), x)
        assert not close(adapted, plain)
        model.save_pretrained(tmp_path)
        assert close(run(merged_by_reading(make, tmp_path), x), adapted)
        assert torch.equal(run(PeftModel.from_pretrained(build(make), tmp_path).eval(), x), adapted)
        with model.disable_adapter():
            assert torch.equal(run(model, x), plain)

    def test_merging(self, subject: tuple[Callable[[], Any], list[str], Tensor]) -> None:
        make, targets, x = subject
        model = adapt(make, targets)
        adapted = run(model, x)
        model.merge_adapter()
        assert close(run(model, x), adapted)
        model.unmerge_adapter()
        assert torch.equal(run(model, x), adapted)
        assert torch.equal(run(deepcopy(model).unload(), x), run(build(make), x))
        merged = model.merge_and_unload()
        assert not any(isinstance(module, TuckerLayer) for module in merged.modules())
        assert close(run(merged, x), adapted)

    def test_gradients_reach_every_factor(self, subject: tuple[Callable[[], Any], list[str], Tensor]) -> None:
        make, targets, x = subject
        model = adapt(make, targets)
        output = model(x)
        (output if isinstance(output, Tensor) else output[0]).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (".tucker_" in name), name
            assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


class TestContainersToSave:
    @pytest.mark.parametrize("saved", [["pooler"], ["pooler", "classifier"]])
    def test_a_pooler_of_several_layers(self, saved: list[str], tmp_path: Path) -> None:
        model = adapt(deberta, ["query_proj"], modules_to_save=saved)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        adapted, plain = run(model, IDS), run(build(deberta), IDS)
        model.save_pretrained(tmp_path)
        adapter = load_adapter(tmp_path, base=build(deberta))
        names = {"pooler": {"pooler.dense.weight", "pooler.dense.bias"}, "classifier": set[str]()}
        if "classifier" in saved:
            names["classifier"] = {"classifier.weight", "classifier.bias"}
        assert set(adapter.overrides) == names["pooler"] | names["classifier"]
        assert close(run(merged_by_reading(deberta, tmp_path), IDS), adapted)
        again = PeftModel.from_pretrained(build(deberta), tmp_path).eval()
        assert torch.equal(run(again, IDS), adapted)
        again.add_adapter("other", TuckerConfig(ranks=2, target_modules=["value_proj"], modules_to_save=["pooler"]))
        again.set_adapter("other")
        assert close(run(again.eval(), IDS), plain)
        again.set_adapter("default")
        with again.disable_adapter():
            assert torch.equal(run(again, IDS), plain)
        assert torch.equal(run(again, IDS), adapted)

    def test_unloading_is_as_in_lora(self) -> None:
        lora = get_peft_model(
            build(deberta), LoraConfig(target_modules=["query_proj"], modules_to_save=["pooler"])
        ).eval()
        model = adapt(deberta, ["query_proj"], modules_to_save=["pooler"])
        for wrapped in (lora, model):
            nn.init.ones_(wrapped.base_model.model.pooler.modules_to_save["default"].dense.weight)
        adapted = run(model, IDS)
        unloaded, reference = deepcopy(model).unload(), lora.unload()
        assert type(unloaded.pooler) is type(reference.pooler)
        assert torch.equal(run(unloaded, IDS), run(reference, IDS))
        assert close(run(model.merge_and_unload(), IDS), adapted)


class TestTiedWeights:
    @pytest.mark.parametrize("targets", [["lm_head"], ["wte"]])
    def test_one_use_changes_as_in_lora(self, targets: list[str], tmp_path: Path) -> None:
        model = adapt(gpt2, targets)
        layer = next(module for module in model.modules() if isinstance(module, TuckerLayer))
        lora = get_peft_model(build(gpt2), LoraConfig(r=8, lora_alpha=8, target_modules=targets)).eval()
        low = next(module for name, module in lora.named_modules() if name.endswith(targets[0]))
        delta = layer.get_delta_weight("default").detach()  # (30, 8): full rank with an identity beside it
        if targets == ["wte"]:
            low.lora_embedding_A["default"].data, low.lora_embedding_B["default"].data = delta.T, torch.eye(8)
        else:
            low.lora_A["default"].weight.data, low.lora_B["default"].weight.data = torch.eye(8), delta
        assert close(run(model, IDS), run(lora, IDS))
        model.save_pretrained(tmp_path)
        assert list(load_adapter(tmp_path, base=build(gpt2)).deltas) == [
            {"lm_head": "lm_head.weight", "wte": "transformer.wte.weight"}[targets[0]]
        ]

    def test_merging_unties_and_unmerging_ties(self) -> None:
        model = adapt(gpt2, ["lm_head"])
        base = model.base_model.model
        assert base.lm_head.base_layer.weight is base.transformer.wte.weight
        before = base.transformer.wte.weight.detach().clone()
        model.merge_adapter()
        assert torch.equal(base.transformer.wte.weight, before)
        model.unmerge_adapter()
        assert base.lm_head.base_layer.weight is base.transformer.wte.weight
        merged = model.merge_and_unload()
        assert torch.equal(merged.transformer.wte.weight, before)
        assert not merged.config.tie_word_embeddings

    @pytest.mark.parametrize("kind", [TuckerConfig, LoraConfig])
    def test_peft_warns_of_tied_targets(self, kind: Any) -> None:
        with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
            get_peft_model(build(llama), kind(target_modules=["lm_head"]))

    def test_uses_that_stay_tied_share_an_adapter(self, tmp_path: Path) -> None:
        model = adapt(llama, ["lm_head"], ensure_weight_tying=True)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, TuckerLayer)}
        (embedding, head) = layers.values()
        assert head.tucker_core["default"] is embedding.tucker_core["default"]
        adapted = run(model, IDS)
        model.save_pretrained(tmp_path)
        adapter = load_adapter(tmp_path, base=build(llama))
        assert set(adapter.deltas) == {"model.embed_tokens.weight", "lm_head.weight"}
        assert close(run(merged_by_reading(llama, tmp_path), IDS), adapted)
        again = PeftModel.from_pretrained(build(llama), tmp_path, is_trainable=True).eval()
        assert torch.equal(run(again, IDS), adapted)
        cores = [m.tucker_core["default"] for m in again.modules() if isinstance(m, TuckerLayer)]
        assert cores[0] is cores[1]
        assert close(run(again.merge_and_unload(), IDS), adapted)
