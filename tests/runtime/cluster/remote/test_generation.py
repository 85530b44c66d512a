"""Sequences on replicas: the tokens of a local runtime, and what cancelling and a lost replica do."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.helpers.exporters import small_images
from tests.helpers.runtime.local_replicas import LocalReplicas
from tests.helpers.server.text_bundle import text_bundle
from tpeft_deploy import Bundle, Runtime, Sampling
from tpeft_deploy.errors import InputError, Unavailable, UnknownTask
from tpeft_deploy.runtime.cluster.remote.remote_runtime import RemoteRuntime
from tpeft_deploy.runtime.generation.handle import GenerationRequest
from tpeft_deploy.runtime.server.registry.files.blobs import Blobs
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.text.model_text import ModelText


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return text_bundle(tmp_path_factory.mktemp("text"))


async def _open(bundle: Bundle, place: Path) -> tuple[RemoteRuntime, LocalReplicas]:
    replicas = LocalReplicas(bundle, Blobs(place).read)
    own = RemoteRuntime(bundle, replicas, replicas.table, lambda _: Quota(), asyncio.get_running_loop())
    await own.open()
    return own, replicas


def test_sequences_run_on_replicas(talking: Bundle, tmp_path: Path) -> None:
    async def work() -> None:
        own, replicas = await _open(talking, tmp_path)
        try:
            await asyncio.to_thread(own.open_generation)
            text = ModelText.open(talking)
            prompt = text.encode("hello there")
            sampling = Sampling(temperature=0.8, seed=5, n=2)
            request = GenerationRequest(prompt, 12, sampling, text=text.detokeniser(prompt))
            with Runtime(talking.path, provider="cpu", threads=1) as local:
                expected = [handle.result(120) for handle in await local.start(request, "a")]
            handles = await own.start(request, "a")
            assert [await asyncio.wrap_future(handle.future) for handle in handles] == expected
            assert [token.text for token in handles[0].tokens] == [token.text for token in expected[0].tokens]
            weighted = await own.start(GenerationRequest(prompt, 3), {"a": 0.5, "b": 0.5})
            assert len((await asyncio.wrap_future(weighted[0].future)).tokens) == 3
            with pytest.raises(InputError):
                await own.start(GenerationRequest([100_000], 3), "a")
            with pytest.raises(UnknownTask):
                await own.start(GenerationRequest(prompt, 3), "none")
            replicas.report()
            figures = own.generation()
            assert figures is not None
            assert figures.finished == 3
            assert own.most_tokens > 12
        finally:
            replicas.close()

    asyncio.run(work())


def test_a_cancelled_sequence_ends_on_its_replica(talking: Bundle, tmp_path: Path) -> None:
    async def work() -> None:
        own, replicas = await _open(talking, tmp_path)
        try:
            (handle,) = await own.start(GenerationRequest([5, 6], 900), "a")
            async for _ in handle:
                break
            handle.cancel()
            async with asyncio.timeout(120):
                while not any((f := r.runtime.generation()) and f.cancelled for r in replicas.replicas.values()):
                    await asyncio.sleep(0.002)
        finally:
            replicas.close()

    asyncio.run(work())


def test_a_lost_replica_ends_its_streams(talking: Bundle, tmp_path: Path) -> None:
    async def work() -> None:
        own, replicas = await _open(talking, tmp_path)
        try:
            (handle,) = await own.start(GenerationRequest([5, 6], 900), "a")
            with pytest.raises(Unavailable, match="gone"):
                async for _ in handle:
                    replicas.dead |= {"r0", "r1"}
            with pytest.raises(Unavailable):
                await own.start(GenerationRequest([5, 6], 9), "a")
        finally:
            replicas.close()

    asyncio.run(work())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_images_and_shown_tokens_reach_a_replica(tmp_path: Path) -> None:
    seeing = small_images.exported(tmp_path)
    pixels, prompt = small_images.images(1, 3), [5, *[small_images.IMAGE] * small_images.EACH, 9]

    async def work() -> None:
        own, replicas = await _open(seeing, tmp_path / "blobs")
        try:
            text = ModelText.open(seeing.components["language"])
            shown = text.detokeniser(shown=["<image>"])
            bias = Sampling(logit_bias={small_images.IMAGE: 100.0})
            request = GenerationRequest(prompt, 8, bias, text=shown, inputs={"pixel_values": pixels})
            with Runtime(seeing.path, provider="cpu", threads=1) as local:
                (wanted,) = [handle.result(120) for handle in await local.start(request, "a")]
            (handle,) = await own.start(request, "a")
            found = await asyncio.wrap_future(handle.future)
            assert [(token.id, token.text) for token in found.tokens] == [(t.id, t.text) for t in wanted.tokens]
            assert any("<image>" in token.text for token in found.tokens)
        finally:
            replicas.close()

    asyncio.run(work())
