"""Chats with images for OpenAI's client, and what a processor of transformers makes of them."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import openai
from PIL import Image

from tests.helpers.server.live import Live


def client_of(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.keys["acme", "infer"], max_retries=0, timeout=100)


def picture(seed: int, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def content_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def url(content: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(content).decode()}"


def shown(given: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": given, "detail": "low"}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def processed(processor: Any, messages: list[Any]) -> tuple[list[int], Any]:
    """Tokens and pixels of a processor of transformers."""
    images, chat = [], []
    for message in messages:
        given = message["content"]
        parts = [said(given)] if isinstance(given, str) else given
        for part in parts:
            if part["type"] == "image_url":
                content = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                images.append(Image.open(io.BytesIO(content)))
        changed = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
        chat.append({**message, "content": changed})
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    found = processor(images=images or None, text=text, return_tensors="np")
    return np.asarray(found["input_ids"])[0].tolist(), found.get("pixel_values")
