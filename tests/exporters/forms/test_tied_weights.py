"""Tied weights: a change belongs to the module that it names, as the training library computes it unmerged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch
import transformers
from torch import nn

from tests.helpers import nets
from tpeft_deploy import Adapter, Bundle, Runtime, export_bundle, export_folded, load_adapter
from tpeft_deploy.errors import UnknownTarget
from tpeft_deploy.exporters.bases import torch_module
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.verify import verify_bundle
from tpeft_deploy.formats.read import base_view
from tpeft_deploy.training import TuckerConfig

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning")]

LIMIT = 1e-5
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
IDS = torch.randint(0, 40, (4, 5), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": IDS}
SHAPES = {"input_ids": {0: "batch", 1: "sequence"}}

Make = Callable[[], nn.Module]


def llama() -> nn.Module:
    return _randomised(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, use_cache=False))
    )


def bert() -> nn.Module:
    return _randomised(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, max_position_embeddings=32)))


class Autoencoder(nn.Module):
    """The decoder multiplies by the encoder's own weight, transposed by nobody: two square linears."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.encode = nn.Linear(16, 16)
        self.decode = nn.Linear(16, 16)
        self.decode.weight = self.encode.weight

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.decode(torch.tanh(self.encode(self.embed(input_ids))))}


def autoencoder() -> nn.Module:
    return _randomised(Autoencoder())


def _randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            mean = float(name.endswith("norm.weight") or "LayerNorm.weight" in name)
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def lora(*targets: str, **others: Any) -> peft.PeftConfig:
    return peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(targets), **others)


def trained(make: Make, config: peft.PeftConfig, path: Path, seed: int) -> Path:
    model = peft.get_peft_model(make(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(path))
    return path


def logits(module: nn.Module, ids: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        outputs = module.eval()(input_ids=ids)
    result: np.ndarray = outputs["logits"].float().numpy()
    return result


def peft_logits(make: Make, path: Path, ids: torch.Tensor) -> np.ndarray:
    """What PEFT computes with the saved adapter, unmerged."""
    return logits(peft.PeftModel.from_pretrained(make(), str(path)), ids)


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


LLAMA = {
    "head-saved": lora("q_proj", modules_to_save=["lm_head"]),
    "embedding-saved": lora("q_proj", modules_to_save=["embed_tokens"]),
    "head": lora("lm_head"),
    "both": lora("embed_tokens", "lm_head"),
    "tied-saved": lora("q_proj", modules_to_save=["lm_head"], ensure_weight_tying=True),
    "tied": lora("embed_tokens", ensure_weight_tying=True),
}
BERT = {
    "cls-saved": lora("query", modules_to_save=["cls"]),
    "words": lora("word_embeddings"),
    "decoder": lora("decoder"),
    "biases": lora("query", bias="all"),
}
SQUARE = {
    "encode": lora("encode"),
    "decode": lora("decode"),
    "decode-saved": lora("embed", modules_to_save=["decode"]),
    "tucker": TuckerConfig(ranks=3, target_modules=["decode"]),
}


def check(make: Make, configs: Mapping[str, peft.PeftConfig], place: Path, again: str) -> Iterator[tuple[str, float]]:
    """The relative errors of every form against PEFT; `again` is trained once more and added to the finished bundle."""
    paths = {task: trained(make, config, place / task, i) for i, (task, config) in enumerate(configs.items())}
    base, ids = make(), {"input_ids": IDS.numpy()}
    adapters = {task: load_adapter(path, base=base) for task, path in paths.items()}
    bundle = export_bundle(base, adapters, place / "bundle", example_inputs=INPUTS, dynamic_shapes=SHAPES, folded=True)
    assert bundle.manifest.rows == "each", bundle.manifest.rows_reason
    for task in adapters:
        answer = compare.run(compare.open_session(bundle.path / "folded" / f"{task}.onnx"), ids, {})
        yield f"folded {task}", error(answer["logits"], peft_logits(make, paths[task], IDS))
    paths["later"] = trained(make, configs[again], place / "later", 100)
    runtime = Runtime(bundle.path, provider="cpu", threads=1)
    runtime.load("later", paths["later"])
    adapters["later"] = load_adapter(paths["later"], base=base)
    wanted = {task: peft_logits(make, path, IDS) for task, path in paths.items()} | {"base": logits(base, IDS)}
    factored = compare.open_session(bundle.path / "factored.onnx")
    for task, adapter in adapters.items():
        assert error(wanted["base"], wanted[task]) > 0.02
        yield f"banked {task}", error(runtime.run(ids, task=task)["logits"], wanted[task])
        yield f"factored {task}", error(compare.run(factored, ids, bundle.feeds(adapter))["logits"], wanted[task])
    tasks = list(wanted)
    for start in range(len(tasks)):
        rows = [tasks[(start + row) % len(tasks)] for row in range(len(IDS))]
        mixed = runtime.run(ids, tasks=rows)["logits"]
        yield f"mixed {rows}", max(error(mixed[i], wanted[task][i]) for i, task in enumerate(rows))
    for task in adapters:
        runtime.pin(task, folded=True)
        yield f"runtime fold {task}", error(runtime.run(ids, task=task)["logits"], wanted[task])


@pytest.mark.parametrize(
    ("make", "configs", "again"),
    [
        pytest.param(llama, LLAMA, "head", marks=pytest.mark.thorough),
        (bert, BERT, "decoder"),
        (autoencoder, SQUARE, "decode"),
    ],
    ids=["llama", "bert", "autoencoder"],
)
def test_every_form_computes_what_peft_computes_unmerged(
    tmp_path: Path, make: Make, configs: Mapping[str, peft.PeftConfig], again: str
) -> None:
    errors = dict(check(make, configs, tmp_path, again))
    worst = max(errors, key=lambda form: errors[form])
    print(f"worst of {len(errors)}: {worst} {errors[worst]:.1e}")
    assert errors[worst] <= LIMIT, worst


def test_resized_embeddings_are_two_tables_of_another_size(tmp_path: Path) -> None:
    def larger() -> nn.Module:
        model: Any = llama()
        model.resize_token_embeddings(43, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[40:] = torch.linspace(-1, 1, 48).reshape(3, 16)
        return model  # type: ignore[no-any-return]

    model = peft.get_peft_model(larger(), lora("q_proj"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(str(tmp_path / "larger"), save_embedding_layers=True)
    adapter = load_adapter(tmp_path / "larger", base=llama())
    assert set(adapter.overrides) == {"lm_head.weight", "model.embed_tokens.weight"}
    export_folded(llama(), adapter, tmp_path / "larger.onnx", example_inputs=INPUTS)
    ids = IDS + 3 * (IDS > 30)  # the new tokens too
    got = compare.run(compare.open_session(tmp_path / "larger.onnx"), {"input_ids": ids.numpy()}, {})["logits"]
    assert error(got, logits(model, ids)) <= LIMIT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    delta = nets.delta((16, 16), (2, 2), 1)
    adapters = {"one": Adapter({"encode.weight": delta}), "other": Adapter({"decode.weight": delta})}
    whole = autoencoder().to(dtype)
    bundle = export_bundle(whole, adapters, tmp_path / "bundle", example_inputs=INPUTS, folded=True)
    assert bundle.manifest.rows == "each", bundle.manifest.rows_reason
    forms = {"base", "folded", "factored", "banked", "banked.cuda", "mixed rows"}
    assert {check["form"] for check in bundle.manifest.gate} == forms
    if dtype == torch.bfloat16:  # which ONNX Runtime does not compute in on the CPU: the gate upcasts
        return
    runtime = Runtime(bundle.path, provider="cpu", threads=1)
    for task, name in (("one", "encode"), ("other", "decode")):
        module = autoencoder().to(dtype).float()
        weight = module.get_parameter(f"{name}.weight").detach() + torch.from_numpy(delta.dense()).float()
        module.get_submodule(name).register_parameter("weight", nn.Parameter(weight))
        assert error(runtime.run({"input_ids": IDS.numpy()}, task=task)["logits"], logits(module, IDS)) <= 2e-3


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    bundle = export_bundle(autoencoder(), {}, tmp_path / "bundle", example_inputs=INPUTS)
    weights = bundle.manifest.weights
    assert bundle.manifest.ties == (("encode.weight", "decode.weight"),)
    assert weights["encode.weight"] == weights["decode.weight"]
    ends = {weight.offset + weight.length for weight in weights.values()}
    assert (bundle.path / "weights.data").stat().st_size == max(ends)
    whole = sum(weight.length for weight in weights.values())
    assert bundle.manifest.weight_bytes == whole - weights["decode.weight"].length
    adapter = nets.adapter_for(autoencoder(), {"embed.weight": (2, 2)}, seed=1)
    export_folded(autoencoder(), adapter, tmp_path / "folded.onnx", example_inputs=INPUTS)
    shapes = [value.shape for value in ir.load(tmp_path / "folded.onnx").graph.initializers.values()]
    assert sum(shape == (16, 16) for shape in shapes) == 1


def test_one_use_of_a_weight_that_was_exported_tied_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bundles were before every use had an initializer: no `ties`, and one name an alias of the other."""
    with monkeypatch.context() as patched:
        patched.setattr(torch_module, "_untied", lambda module: nullcontext())
        patched.setattr(base_view, "holders", lambda base: {n: (id(t), "") for n, t in every(base)})
        export_bundle(autoencoder(), {}, tmp_path / "bundle", example_inputs=INPUTS)
    document = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    del document["ties"], document["digest"]
    document["digest"] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(document))
    bundle, delta = Bundle.open(tmp_path / "bundle"), nets.delta((16, 16), (2, 2), 1)
    runtime = Runtime(bundle.path, provider="cpu", threads=1)
    for name in ("encode.weight", "decode.weight"):
        for adapter in (Adapter({name: delta}), Adapter({}, {name: np.ones((16, 16), np.float32)})):
            for add in (bundle.add, runtime.load):
                with pytest.raises(UnknownTarget, match=rf"'{name}'.*one initializer holds both.*Export"):
                    add("one", adapter)
    both = Adapter({"encode.weight": delta, "decode.weight": delta})
    bundle.add("both", both)
    module = autoencoder()
    with torch.no_grad():
        module.get_parameter("encode.weight").add_(torch.from_numpy(delta.dense()).float())
    runtime = Runtime(bundle.path, provider="cpu", threads=1)
    for _ in range(2):
        answer = runtime.run({"input_ids": IDS.numpy()}, tasks=["both"] * len(IDS))["logits"]
        assert error(np.stack(list(answer)), logits(module, IDS)) <= LIMIT
        runtime.pin("both", folded=True)
    verify_bundle(bundle.path, report=tmp_path / "report.html")
    mixed = runtime.run({"input_ids": IDS.numpy()}, task={"both": 0.5})["logits"]
    with torch.no_grad():
        module.get_parameter("encode.weight").sub_(0.5 * torch.from_numpy(delta.dense()).float())
    assert error(mixed, logits(module, IDS)) <= LIMIT


def every(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
