"""Images in chats: the answers of transformers' processor and merged model, and refusals in one line."""

from __future__ import annotations

import os
import struct
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import transformers
from PIL import Image

from tests.helpers.documents import blocks, reading
from tests.helpers.exporters.small_images import EACH, IMAGE, PREPARED, exported, generated, tokenizer
from tests.helpers.server.chat_images import client_of, content_of, picture, processed, said, shown, url
from tests.helpers.server.live import Live, serving_bundle
from tpeft_deploy import Bundle

COUNT = 8
CLIENTS = Path(__file__).parents[3] / "docs" / "clients.md"

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def seeing(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving_bundle(bundle, tmp_path_factory.mktemp("state")) as live:
        yield live


@pytest.fixture(scope="module")
def client(seeing: Live) -> Iterator[openai.OpenAI]:
    with client_of(seeing) as client:
        yield client


WIDE, TALL = content_of(picture(1, (30, 50))), content_of(picture(2, (44, 21)), "JPEG")
CHATS: dict[str, list[Any]] = {
    "before": [{"role": "user", "content": [said("w5 w9"), shown(url(WIDE))]}],
    "around": [
        {
            "role": "user",
            "content": [said("w5"), shown(url(WIDE)), said("w9"), shown(url(TALL, "image/jpeg")), said("w7")],
        }
    ],
    "several": [
        {"role": "system", "content": "w3 w4"},
        {"role": "user", "content": [shown(url(TALL, "image/jpeg")), said("w5")]},
        {"role": "assistant", "content": "w8"},
        {"role": "user", "content": [said("w6"), shown(url(WIDE))]},
    ],
    "none": [{"role": "user", "content": "w5 w6 w7"}],
}


def prepared(messages: list[Any]) -> tuple[list[int], Any]:
    """Tokens and pixels of transformers' processor."""
    tokens = tokenizer()
    tokens.image_token, tokens.image_token_id = "<image>", IMAGE
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(**PREPARED), tokens, 8, "default", tokens.chat_template, "<image>", 1
    )
    return processed(processor, messages)


def test_the_example_of_the_clients_page(bundle: Bundle, seeing: Live, tmp_path: Path) -> None:
    [block] = [block for block in blocks(CLIENTS.read_text()) if "image_url" in block.text]
    (tmp_path / "label.png").write_bytes(WIDE)
    values = {"http://localhost:8080": seeing.url, "What is on the label?": "w5 w9", '"support"': '"a"'}
    with reading(tmp_path, values) as reader:
        os.environ["TPEFT_KEY"] = seeing.keys["acme", "infer"]
        reader.follow(block)
    prompt, pixels = prepared(CHATS["before"])
    wanted = generated(bundle, "a", prompt, pixels, 12)
    assert reader.names["text"] == tokenizer().decode(wanted, skip_special_tokens=True)


@pytest.mark.parametrize("name", CHATS)
def test_answers_are_those_of_the_processor_and_the_merged_model(
    bundle: Bundle, client: openai.OpenAI, name: str
) -> None:
    prompt, pixels = prepared(CHATS[name])
    with ThreadPoolExecutor() as pool:  # rows of several tasks in one run
        wanted = {task: generated(bundle, task, prompt, pixels, COUNT) for task in ("a", "b", "base")}
        asked: Any = {"messages": CHATS[name], "max_tokens": COUNT, "temperature": 0}
        answers = dict(
            zip(wanted, pool.map(lambda t: client.chat.completions.create(model=t, n=2, **asked), wanted), strict=True)
        )
    for task, answer in answers.items():
        texts = {choice.message.content for choice in answer.choices}
        assert texts == {tokenizer().decode(wanted[task], skip_special_tokens=True)}
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(prompt)
    stream = client.chat.completions.create(model="a", stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) in {
        choice.message.content for choice in answers["a"].choices
    }


def test_the_name_of_the_image_token_in_a_text_is_text(client: openai.OpenAI) -> None:
    known: Any = {"model": "a", "max_tokens": 2}
    chat: Any = [{"role": "user", "content": [said("w5 <image>"), shown(url(WIDE))]}]
    answer = client.chat.completions.create(messages=chat, **known)
    assert answer.usage is not None
    other: Any = [{"role": "user", "content": [said("w5"), shown(url(WIDE))]}]
    plain = client.chat.completions.create(messages=other, **known)
    assert plain.usage is not None
    assert plain.usage.prompt_tokens == EACH + 3
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="each of 1 images, got 2 image tokens"):
        client.chat.completions.create(messages=chat, extra_body={"parse_special": True}, **known)


@pytest.mark.parametrize(
    "content",
    [
        content_of(picture(3, (20, 30), "CMYK"), "JPEG"),
        content_of(picture(4, (20, 30), "P"), transparency=3),
        content_of(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)),
        content_of(picture(5, (20, 30)), "WEBP", save_all=True, append_images=[picture(6, (20, 30))]),
    ],
    ids=["CMYK", "palette", "16 bits", "animated"],
)
def test_images_of_other_modes_are_those_of_the_processor(
    bundle: Bundle, client: openai.OpenAI, content: bytes
) -> None:
    chat: Any = [{"role": "user", "content": [said("w5"), shown(url(content))]}]
    wanted = generated(bundle, "a", *prepared(chat), COUNT)
    answer = client.chat.completions.create(model="a", messages=chat, max_tokens=COUNT, temperature=0)
    assert answer.choices[0].message.content == tokenizer().decode(wanted, skip_special_tokens=True)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says that it is large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("https://example.com/cat.png", "never fetched; send a data: URL"),
        ("file:///etc/passwd", "never fetched"),
        ("cat.png", "expected a data: URL"),
        ("data:image/png,abc", "in base64"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "one of the types image/png"),
        ("data:image/png;base64,@@@@", "read field 'messages[1].content[1]': expected an image in base64"),
        ("data:image/png;base64,abc", "expected an image in base64"),
        (url(b"text"), "read field 'messages[1].content[1]': expected an image file"),
        (url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "expected an image file"),
        (url(content_of(picture(1, (9, 9)), "BMP")), "expected an image file"),
        (url(WIDE[:-900]), "expected an image file"),
        (url(bomb(60000, 60000)), "expected"),
        (url(bomb(6000, 6000)), "at most 33,554,432 pixels"),
        (url(content_of(Image.new("L", (1, 60000)))), "got 1 x 60000"),
        (url(bytes(10 << 20)), "expected an image file"),
        ({"no": "text"}, "image_url.url to be a text"),
        (None, "image_url.url to be a text"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(client: openai.OpenAI, given: Any, told: str) -> None:
    chat: Any = [{"role": "system", "content": "w3"}, {"role": "user", "content": [said("w5"), shown(given)]}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="a", messages=chat, max_tokens=2)
    message = caught.value.body["message"]  # type: ignore[index]
    assert told in message
    assert "\n" not in message
    assert caught.value.param == "messages[1].content[1]"


def test_the_number_of_images_is_bounded(client: openai.OpenAI) -> None:
    chat: Any = [{"role": "user", "content": [shown(url(WIDE))] * 17}]
    with pytest.raises(openai.BadRequestError, match="at most 16 images, got 17"):
        client.chat.completions.create(model="a", messages=chat, max_tokens=2)


def test_memory_is_given_back(seeing: Live, client: openai.OpenAI) -> None:
    large = content_of(Image.new("RGB", (4000, 4000)))
    chat: Any = [{"role": "user", "content": [shown(url(large)), shown(url(bytes(300_000)))]}]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="a", messages=chat, max_tokens=2)
    chat[0]["content"].pop()
    assert client.chat.completions.create(model="a", messages=chat, max_tokens=2).choices


def test_a_bundle_without_images_says_so(live: Live) -> None:
    chat: Any = [{"role": "user", "content": [said("w5"), shown(url(WIDE))]}]
    with client_of(live) as client, pytest.raises(openai.BadRequestError, match="a bundle for generation with images"):
        client.chat.completions.create(model="a", messages=chat, max_tokens=2)


def test_an_image_without_pillow_names_the_extra(
    seeing: Live, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    generations = seeing.served.service.generations
    generations.__dict__.pop("images", None)
    for name in ("PIL", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    chat: Any = [{"role": "user", "content": [said("w5"), shown(url(WIDE))]}]
    with pytest.raises(openai.APIStatusError, match=r"pip install 'tpeft-deploy\[images\]'") as caught:
        client.chat.completions.create(model="a", messages=chat, max_tokens=2)
    assert (caught.value.status_code, caught.value.type) == (501, "invalid_request_error")
    assert "\n" not in caught.value.body["message"]  # type: ignore[index]
    assert client.chat.completions.create(model="a", messages=CHATS["none"], max_tokens=2).choices
