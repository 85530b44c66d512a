"""Bundles of small encoders with a tokenizer: one that embeds texts, and one that classifies them."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.helpers.commands import succeed
from tests.helpers.exporters.small_encoder_decoders import T5
from tests.helpers.runtime.tokenizers_of_styles import tokenizer as of_style
from tpeft_deploy import Bundle, export_bundle, load_adapter

POSITIONS = 64
MODULES = ("Transformer", "Pooling", "Normalize")
HEADS: dict[str, dict[str, Any]] = {
    "score": {"num_labels": 1},
    "mood": {"id2label": {0: "sad", 1: "glad"}, "problem_type": "single_label_classification"},
    "topics": {"id2label": {0: "cats", 1: "dogs", 2: "fish"}, "problem_type": "multi_label_classification"},
}


def tokenizer(*, types: bool = True) -> PreTrainedTokenizerFast:
    made: Tokenizer = deepcopy(of_style("wordpiece"))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokens: Any = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<unk>"}
    tokens["model_input_names"] = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    return PreTrainedTokenizerFast(tokenizer_object=made, **tokens)


def config(**own: Any) -> BertConfig:
    return BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=POSITIONS, initializer_range=0.3, pad_token_id=3, **own,
    )  # fmt: skip


def embedder() -> BertModel:
    torch.manual_seed(0)
    return BertModel(config(matryoshka_dimensions=[16])).eval()


def classifier(**own: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(config(**own)).eval()


def sentence_transformer(place: Path, pooling: dict[str, Any], **more: Any) -> None:
    """Write the files of sentence-transformers beside a model."""
    kinds = [{"idx": at, "path": f"{at}_{kind}" if at else "", "type": f"x.{kind}"} for at, kind in enumerate(MODULES)]
    (place / "modules.json").write_text(json.dumps(kinds))
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (place / "config_sentence_transformers.json").write_text(json.dumps(more))


def lora(model: torch.nn.Module, seed: int, **own: Any) -> PeftModel:
    torch.manual_seed(seed)
    own = {"target_modules": ["query", "dense"], **own}
    made = LoraConfig(r=2 + seed, lora_alpha=8, init_lora_weights=False, **own)
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # PEFT uses an alias of transformers
        return get_peft_model(model, made).eval()


def embedding_bundle(place: Path) -> tuple[Bundle, dict[str, Any]]:
    """Export the bundle, with the task "law"; returns the models of its tasks too."""
    base = place / "base"
    embedder().save_pretrained(base)
    tokenizer().save_pretrained(base)
    sentence_transformer(base, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    law = lora(embedder(), 0)
    law.save_pretrained(str(place / "law"))
    adapters = {"law": load_adapter(place / "law", base=embedder())}
    return export_bundle(base, adapters, place / "embed"), {"base": embedder(), "law": law}


def encoder_decoder_bundle(place: Path) -> tuple[Bundle, dict[str, Any]]:
    """Export a T5 of which the encoder embeds texts, with the task "law"; returns the encoders of its tasks too."""
    base, out = place / "base", place / "both"

    def model() -> T5ForConditionalGeneration:
        torch.manual_seed(0)
        return T5ForConditionalGeneration(T5Config(**T5 | {"vocab_size": 200, "num_layers": 1})).eval()

    model().save_pretrained(base)
    tokenizer(types=False).save_pretrained(base)
    law = lora(model(), 0, target_modules=["q", "wo"])
    law.save_pretrained(str(place / "law"))
    succeed("export", "bundle", base, "--out", out, "--pooling", "mean", "--adapter", f"law={place / 'law'}")
    encoders = {task: own.get_encoder() for task, own in (("base", model()), ("law", law.base_model.model))}
    return Bundle.open(out), encoders


def classifying_bundle(place: Path) -> tuple[Bundle, dict[str, Any]]:
    """Export the bundle, with the tasks of `HEADS`; returns the models of its tasks too."""
    base = place / "base"
    own: Any = {"id2label": {0: "no", 1: "yes"}}
    classifier(**own).save_pretrained(base)
    tokenizer().save_pretrained(base)
    models: dict[str, Any] = {"base": classifier(**own), "plain": lora(classifier(**own), 3)}
    for seed, (task, head) in enumerate(HEADS.items()):
        models[task] = lora(classifier(**head), seed, modules_to_save=["classifier"])
    adapters = {}
    for task, model in models.items():
        if task != "base":
            model.save_pretrained(str(place / task))
            if task in HEADS:
                model.base_model.model.config.save_pretrained(str(place / task))
            adapters[task] = load_adapter(place / task, base=classifier(**own))
    return export_bundle(base, adapters, place / "classes"), models
