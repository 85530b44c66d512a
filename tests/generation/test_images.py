"""Prompts with images: the tokens of `generate` of each row's merged PEFT model of images and text."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from tests.helpers.commands import call
from tests.helpers.exporters.small_images import EACH, IMAGE, PREPARED, exported, generated, images
from tpeft_deploy import Bundle, Runtime, Sampling
from tpeft_deploy.errors import InputError
from tpeft_deploy.exporters.verify import verify_bundle
from tpeft_deploy.runtime.generation import service
from tpeft_deploy.runtime.generation.handle import GenerationRequest
from tpeft_deploy.runtime.generation.loop import Generator
from tpeft_deploy.runtime.text.images import ImageFile, with_images

SYSTEM = [7, 3, 21, 40, 11, 2, 9, 30, 5, 17, 44, 8, 26, 1, 33, 12, 6]  # more than a block of known prefixes
SEEN = [IMAGE] * EACH
PROMPTS = [[5, *SEEN, 9, *SEEN, 31, 7], [*SEEN, 2, 33], [1, 44, 6, 25, 38], [17, 4, *SEEN, 22]]
PIXELS = [images(2, 1), images(1, 2), None, images(1, 3)]
BIAS = 4.0  # of the logit of the placeholder
ROWS = ["a", "b", "base", "base"]
# Sequence -> its row, and the part of the tokens that it asks for: three run at a time.
SEQUENCES = [(0, 1.0), (1, 0.3), (2, 0.6), (3, 1.0), (1, 1.0), (0, 0.4), (2, 1.0)]

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(tmp_path_factory.mktemp("llava"))


def opened(bundle: Bundle, slots: int = 3, **options: Any) -> Runtime:
    with Runtime(bundle.path, provider="cpu", preload=False) as runtime:
        plan = runtime._generation._plan
        assert plan is not None
    return Runtime(bundle.path, provider="cpu", threads=1, kv_bytes=slots * plan.nbytes // plan.slots, **options)


@pytest.fixture(scope="module")
def runtime(bundle: Bundle) -> Iterator[Runtime]:
    with opened(bundle) as runtime:
        yield runtime


def given(row: int) -> dict[str, Any] | None:
    return None if PIXELS[row] is None else {"pixel_values": PIXELS[row]}


def test_the_components_are_proved(bundle: Bundle) -> None:
    assert list(bundle.components) == ["vision", "language"]
    ports = bundle.components["language"].manifest.decoder
    assert ports is not None
    assert (ports.features, ports.placeholder, ports.source) == ("features", IMAGE, "vision")
    assert ports.source_outputs == ("image_features",)
    for part in bundle.components.values():
        assert part.manifest.rows == "each", part.manifest.rows_reason
        assert {record["oracle"].split()[0] for record in part.manifest.oracles.values()} == {"peft"}
        assert len(part.manifest.oracles) == 2
    checks = verify_bundle(bundle.path, base=str(bundle.path.parent / "base")).checks
    assert max(check.error for check in checks) <= 1e-5


@pytest.mark.parametrize("count", [32, pytest.param(128, marks=pytest.mark.soak)])
def test_rows_generate_what_their_merged_models_do(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(service, "Generator", partial(Generator, chunk=3))  # pieces that divide images
    expected = [generated(bundle, *row, count) for row in zip(ROWS, PROMPTS, PIXELS, strict=True)]
    with opened(bundle) as runtime:
        found = asyncio.run(streamed(runtime, count))
        for (row, part), tokens in zip(SEQUENCES, found, strict=True):
            assert tokens == expected[row][: max(1, int(part * count))]
        inputs = [given(row) for row in range(len(ROWS))]
        assert runtime.generate(PROMPTS, tasks=ROWS, inputs=inputs, max_new_tokens=count) == expected


async def streamed(runtime: Runtime, count: int) -> list[list[int]]:
    async def one(row: int, part: float) -> list[int]:
        options: Any = {"inputs": given(row), "max_new_tokens": max(1, int(part * count))}
        return [token.id async for token in runtime.stream(PROMPTS[row], ROWS[row], **options)]

    return await asyncio.gather(*(one(row, part) for row, part in SEQUENCES))


def test_a_placeholder_that_is_generated_has_its_embedding(runtime: Runtime, bundle: Bundle) -> None:
    options: Any = {"inputs": [given(1)], "sampling": Sampling(logit_bias={IMAGE: BIAS}), "max_new_tokens": 16}
    [found] = runtime.generate([PROMPTS[1]], **options)
    assert 0 < found.count(IMAGE) < 16
    bias = [[[IMAGE], BIAS]]
    assert found == generated(bundle, "base", PROMPTS[1], PIXELS[1], 16, sequence_bias=bias)


def test_prompts_share_what_is_before_another_image(bundle: Bundle) -> None:
    prompt = [*SYSTEM, *SEEN, *SEEN, *SYSTEM]
    first, second, third = images(2, 4), images(2, 5), images(2, 6)
    third[0] = first[0]
    reused = []
    with opened(bundle) as runtime:
        for pixels in (first, second, third, first):
            options: Any = {"inputs": [{"pixel_values": pixels}], "max_new_tokens": 6}
            assert runtime.generate([prompt], "a", **options) == [generated(bundle, "a", prompt, pixels, 6)]
            stats = runtime.generation()
            assert stats is not None
            reused.append(stats.reused_tokens)
    # Blocks of 16 tokens: the first ends before the images, the second has both of them.
    assert np.diff([0, *reused]).tolist() == [0, 16, 16, 32]


def test_a_preempted_sequence_goes_on_with_its_image(bundle: Bundle) -> None:
    async def both(runtime: Runtime) -> list[list[int]]:
        low = runtime.stream(PROMPTS[1], ROWS[1], inputs=given(1), max_new_tokens=24, priority=5)
        found = [(await anext(low)).id]
        high = [token.id async for token in runtime.stream(PROMPTS[3], inputs=given(3), max_new_tokens=4)]
        return [found + [token.id async for token in low], high]

    with opened(bundle, 1, prefix_bytes=0) as runtime:
        found = asyncio.run(both(runtime))
    wanted = [(1, 24), (3, 4)]
    assert found == [generated(bundle, ROWS[row], PROMPTS[row], PIXELS[row], count) for row, count in wanted]


@pytest.mark.parametrize(
    ("prompt", "inputs", "told"),
    [
        ([5, IMAGE, 9], None, "expected a placeholder token 49 for each feature, 0 for 0 images, got 1 in the prompt"),
        ([5, *SEEN, 9], {"pixel_values": images(0, 0)}, "0 for 0 images, got 4"),
        ([5, *SEEN, 9], {"pixel_values": images(2, 0)}, "8 for 2 images, got 4"),
        ([5, 9], {"pixel_values": images(1, 0)}, "4 for 1 images, got 0"),
        ([5, *SEEN], {"pixel_values": images(1, 0)[..., :8]}, "input 'pixel_values': expected shape"),
        ([5, *SEEN], {"pixel_values": images(1, 0)[0]}, "input 'pixel_values': expected shape"),
        ([5, *SEEN], {"pixel_values": images(1, 0).astype(np.float64)}, "dtype float32"),
        ([5, *SEEN], {"pixels": images(1, 0)}, "an unknown 'pixels'"),
        ([5, *SEEN], {"pixel_values": "cat.png"}, "input 'pixel_values': expected an array"),
    ],
)
def test_images_that_do_not_fit_are_refused(runtime: Runtime, prompt: list[int], inputs: Any, told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)) as error:
        runtime.generate([PROMPTS[2], prompt], inputs=[None, inputs], max_new_tokens=2)
    assert "\n" not in str(error.value)


def test_the_command_line_reads_images(bundle: Bundle, tmp_path: Path) -> None:
    files, random = [tmp_path / "wide.png", tmp_path / "tall.jpg"], np.random.default_rng(8)
    for file, size in zip(files, [(30, 50, 3), (44, 21, 3)], strict=True):
        Image.fromarray(random.integers(0, 255, size, np.uint8)).save(file)
    asked = ["--prompt", "w5 <image> w9 <image> w7", "--max-new-tokens", 8, "--json", "--provider", "cpu"]
    shown = [part for file in files for part in ("--image", file)]
    result = call("generate", bundle.path, "--task", "a", *asked, *shown)
    assert result.exit_code == 0, result.stderr
    [row] = json.loads(result.stdout)["results"]
    pixels = transformers.CLIPImageProcessorPil(**PREPARED)([Image.open(file) for file in files])["pixel_values"]
    assert row["tokens"] == generated(bundle, "a", [5, *SEEN, 9, *SEEN, 7], np.stack(pixels), 8)
    result = call("generate", bundle.path, *asked, "--image", bundle.path / "manifest.json")
    assert result.exit_code == 1
    assert "expected an image file" in result.stderr
    result = call("generate", bundle.path, *asked, *shown[:2])
    assert "4 for 1 images, got 2 in the prompt" in result.stderr


def test_images_are_refused_where_none_are_taken(llama_bundle: Bundle) -> None:
    with Runtime(llama_bundle.path, provider="cpu") as runtime, pytest.raises(InputError, match="no inputs"):
        runtime.generate([[5, 9]], inputs=[{"pixel_values": images(1, 0)}], max_new_tokens=2)
    with pytest.raises(InputError, match="expected a bundle for generation with images"):
        with_images(GenerationRequest([5]), llama_bundle, [ImageFile(b"cat")])
