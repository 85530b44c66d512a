"""A small InternVL with PEFT adapters, and the tokens and pixels of transformers' processor for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.helpers.exporters.small_decoders import ONE, SIZES
from tests.helpers.exporters.small_images import Array, merged_tokens, with_adapters
from tpeft_deploy.bundle.directory import Bundle

IMAGE, START, END = 47, 45, 46
EACH = 4  # features of a tile
SIDE = 16
PREPARED: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}, "max_patches": 4}
TASKS = {
    "a": r".*language_model.*(q_proj|v_proj)|.*vision_tower.*layer\.0.*q_proj|.*projector\.linear_2",
    "b": r".*language_model.*(k_proj|down_proj)|.*vision_tower.*layer\.0.*fc1|.*projector\.linear_1",
}
TEMPLATE = (
    "{% for m in messages %}{{ 'w1 ' }}{% if m['content'] is string %}{{ m['content'] + ' ' }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT> ' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'w2' }}{% endif %}"
)


class Processor(transformers.InternVLProcessor):  # type: ignore[misc]  # transformers has no types
    """InternVL's processor without videos, which need torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def made() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    vision = transformers.InternVLVisionConfig(
        **sizes, image_size=[SIDE, SIDE], patch_size=[4, 4], initializer_range=0.3, layer_scale_init_value=0.5
    )
    text = transformers.LlamaConfig(**SIZES | ONE | {"max_position_embeddings": 256})
    config = transformers.InternVLConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=IMAGE
    )
    return transformers.InternVLForConditionalGeneration(config).eval()


def tokenizer() -> Any:
    """Tokenizer of the words w0, w1, ... and of images."""
    special = {"<img>": START, "</img>": END, "<IMG_CONTEXT>": IMAGE, "<video>": IMAGE + 1}
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(START)} | special, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(list(special))
    names = dict(
        zip(("start_image_token", "end_image_token", "context_image_token", "video_token"), special, strict=True)
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, chat_template=TEMPLATE, extra_special_tokens=names
    )


def processor(**options: Any) -> Any:
    images = transformers.models.got_ocr2.GotOcr2ImageProcessorPil(**PREPARED | options)
    tokens = tokenizer()
    return Processor(images, tokens, None, image_seq_length=EACH, chat_template=tokens.chat_template)


def saved(place: Path, **options: Any) -> None:
    """Write model, tokenizer and processor into a directory."""
    made().save_pretrained(place)
    processor(**options).save_pretrained(place)


def exported(place: Path) -> Bundle:
    """A bundle with both tasks; the directories of model and adapters are beside it."""
    saved(place / "base")
    return with_adapters(place, made, TASKS)


def generated(bundle: Bundle, task: str, prompt: list[int], pixels: Array | None, count: int) -> list[int]:
    """New tokens of `generate` of the merged model of a task."""
    return merged_tokens(made(), bundle, task, prompt, pixels, count)
