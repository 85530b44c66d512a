"""A small model of images and text with PEFT adapters of both towers, and what its merged models generate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.helpers.exporters.small_decoders import ONE, SIZES
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.exporters import export_bundle
from tpeft_deploy.formats import load_adapter

Array = np.ndarray[Any, Any]

IMAGE = 49  # placeholder token
EACH = 4  # features of an image
PREPARED: dict[str, Any] = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
TASKS = {
    "a": r".*language_model.*(q_proj|v_proj)|.*vision_tower.*layers\.0.*q_proj|.*projector\.linear_2",
    "b": r".*language_model.*(k_proj|down_proj)|.*vision_tower.*layers\.0.*fc1|.*projector\.linear_1",
}
TEMPLATE = (
    "{% for m in messages %}{{ 'w1 ' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'w2' }}{% endif %}"
)


def made(positions: int = 256) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8, initializer_range=0.3)
    text = transformers.LlamaConfig(**SIZES | ONE | {"max_position_embeddings": positions})
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return transformers.LlavaForConditionalGeneration(config).eval()


def tokenizer() -> Any:
    """Tokenizer of the words w0, w1, ... and of images."""
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(IMAGE)} | {"<image>": IMAGE}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<image>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE)


def images(count: int, seed: int) -> Array:
    """Pixel values of some images."""
    return np.random.default_rng(seed).standard_normal((count, 3, 16, 16)).astype(np.float32)


def exported(place: Path) -> Bundle:
    """A bundle with both tasks; the directories of model and adapters are beside it."""
    made().save_pretrained(place / "base")
    tokenizer().save_pretrained(place / "base")
    transformers.CLIPImageProcessorPil(**PREPARED).save_pretrained(place / "base")
    return with_adapters(place, made, TASKS)


def with_adapters(place: Path, made: Callable[[], Any], tasks: Mapping[str, str]) -> Bundle:
    """A bundle of the directory `base` in a place, with a PEFT adapter of some targets for each task."""
    adapters = {}
    for seed, (task, targets) in enumerate(tasks.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=2 + seed, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # PEFT uses an alias of transformers
            model = get_peft_model(made(), config)
        model.save_pretrained(str(place / task), save_embedding_layers=False)
        adapters[task] = load_adapter(place / task, base=str(place / "base"))
    return export_bundle(str(place / "base"), adapters, place / "bundle", generation=True)


def generated(
    bundle: Bundle, task: str, prompt: list[int], pixels: Array | None, count: int, **options: Any
) -> list[int]:
    """New tokens of `generate` of the merged model of a task."""
    return merged_tokens(made(), bundle, task, prompt, pixels, count, **options)


def merged_tokens(
    model: Any, bundle: Bundle, task: str, prompt: list[int], pixels: Array | None, count: int, **options: Any
) -> list[int]:
    """New tokens of `generate` of a model with the adapter of a task merged."""
    if task != "base":
        model = PeftModel.from_pretrained(model, str(bundle.path.parent / task)).merge_and_unload()
    ids = torch.tensor([prompt])
    given = {} if pixels is None else {"pixel_values": torch.from_numpy(pixels)}
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), **given, do_sample=False, max_new_tokens=count, **options
    )
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens
