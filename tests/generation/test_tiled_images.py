"""Chats with images that InternVL cuts into tiles: the answers of transformers' processor and merged model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from tests.helpers.exporters.small_internvl import EACH, exported, generated, processor, tokenizer
from tests.helpers.server.chat_images import client_of, content_of, picture, processed, said, shown, url
from tests.helpers.server.live import serving_bundle
from tpeft_deploy import Bundle

COUNT = 8
SQUARE, WIDE, TALL = (content_of(picture(seed, size)) for seed, size in enumerate([(16, 16), (30, 66), (50, 21)]))
CHATS: dict[str, list[Any]] = {
    "one tile": [{"role": "user", "content": [said("w5 w9"), shown(url(SQUARE))]}],
    "two tiles": [{"role": "user", "content": [shown(url(WIDE)), said("w5 w9")]}],
    "several": [
        {"role": "system", "content": "w3 w4"},
        {"role": "user", "content": [shown(url(TALL)), said("w5"), shown(url(SQUARE)), said("w6"), shown(url(WIDE))]},
    ],
    "none": [{"role": "user", "content": "w5 w6 w7"}],
}

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module")
def client(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with serving_bundle(bundle, tmp_path_factory.mktemp("state")) as live, client_of(live) as client:
        yield client


@pytest.mark.parametrize("name", CHATS)
def test_answers_are_those_of_the_processor_and_the_merged_model(
    bundle: Bundle, client: openai.OpenAI, name: str
) -> None:
    prompt, pixels = processed(processor(), CHATS[name])
    for task in ("a", "b", "base"):
        answer = client.chat.completions.create(model=task, messages=CHATS[name], max_tokens=COUNT, temperature=0)
        wanted = generated(bundle, task, prompt, pixels, COUNT)
        assert answer.choices[0].message.content == tokenizer().decode(wanted, skip_special_tokens=True)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(prompt)


def test_tiles_count_as_tokens_before_images_are_decoded(client: openai.OpenAI) -> None:
    tall = content_of(Image.new("RGB", (100, 800)))
    chat: Any = [{"role": "user", "content": [shown(url(tall))] * 13}]
    with pytest.raises(openai.BadRequestError, match=f"a prompt of {13 * (5 * EACH + 2) + 2}") as caught:
        client.chat.completions.create(model="a", messages=chat, max_tokens=2)
    assert caught.value.code == "context_length_exceeded"


def test_a_broken_image_is_named_by_its_part(client: openai.OpenAI) -> None:
    chat: Any = [{"role": "user", "content": [said("w5"), shown(url(WIDE)), shown(url(b"text"))]}]
    with pytest.raises(openai.BadRequestError, match="expected an image file") as caught:
        client.chat.completions.create(model="a", messages=chat, max_tokens=2)
    assert caught.value.param == "messages[0].content[2]"
