"""The ingress over replicas in this process: the server's routes, its registry, and its health."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import numpy as np

from tests.helpers import nets
from tests.helpers.runtime.local_replicas import LocalReplicas
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.runtime.cluster.cluster_settings import ClusterSettings
from tpeft_deploy.runtime.cluster.ingress import Ingress
from tpeft_deploy.runtime.server.registry.files.blobs import Blobs

PIXELS = np.random.default_rng(0).standard_normal((2, 1, 12, 14)).astype(np.float32)
BODY = {"inputs": [{"name": "pixels", "shape": [2, 1, 12, 14], "datatype": "FP32", "data": PIXELS.ravel().tolist()}]}


def test_routes_of_the_server_work_over_replicas(conv_bundle: Bundle, tmp_path: Path) -> None:
    adapter = nets.adapter_for(nets.conv_net()[0], {"up.weight": (2, 2), "stem.weight": (2, 1, 2, 2)}, seed=1)
    replicas = LocalReplicas(conv_bundle, Blobs(tmp_path / "blobs").read)

    async def outputs(client: httpx.AsyncClient, model: str) -> list[float]:
        answer = await client.post(f"/v2/models/{model}/infer", json=BODY)
        assert answer.status_code == 200, answer.text
        found: list[float] = answer.json()["outputs"][0]["data"]
        return found

    async def work() -> None:
        server = {"state": str(tmp_path), "no_auth": True, "access_log": False}
        ingress = await Ingress.open(ClusterSettings(str(conv_bundle.path), server), replicas, replicas.table)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(ingress.application), base_url="http://localhost"
        ) as client:
            ingress.check()
            with Runtime(conv_bundle.path, provider="cpu", threads=1) as local:
                local.load("new", adapter)
                names = [port.name for port in conv_bundle.manifest.outputs]
                expected = local.run({"pixels": PIXELS}, "two")[names[0]]
                np.testing.assert_allclose(await outputs(client, "two"), expected.ravel(), rtol=1e-4, atol=1e-5)
                upload = {"weights": ("a.safetensors", adapter.to_bytes())}
                answer = await client.post("/v2/registry/tasks/new/versions", files=upload)
                assert answer.status_code in {200, 201}, answer.text
                assert answer.json()["versions"][0]["tier"] == "device"
                expected = local.run({"pixels": PIXELS}, "new")[names[0]]
                np.testing.assert_allclose(await outputs(client, "new"), expected.ravel(), rtol=1e-4, atol=1e-5)
            assert (await client.put("/v2/registry/tasks/new/pin", json={})).status_code == 200
            assert all(len(own.runtime.pins()) == 1 for own in replicas.replicas.values())
            assert (await client.delete("/v2/registry/tasks/new")).status_code == 200
            assert (await client.post("/v2/models/new/infer", json=BODY)).status_code == 404
            replicas.dead |= {"r0", "r1"}
            replicas.report()
            answer = await client.post("/v2/models/two/infer", json=BODY)
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            replicas.dead.clear()
            assert b"tpeft_queue_rows" in (await client.get("/metrics")).content
        await ingress.close()

    try:
        asyncio.run(work())
    finally:
        replicas.close()
