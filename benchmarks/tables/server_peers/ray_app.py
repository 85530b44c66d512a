"""Ray Serve, a model multiplexed by request: python -m benchmarks.tables.server_peers.ray_app DIRECTORY PORT"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import ray
from ray import serve

from benchmarks.tables.server_peers.models import answer, session


@serve.deployment(max_ongoing_requests=32)
class Adapters:
    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    @serve.multiplexed(max_num_models_per_replica=16)  # type: ignore[untyped-decorator]
    async def model(self, task: str) -> Any:
        return session(self.directory / f"{task}.onnx")

    async def __call__(self, request: Any) -> dict[str, Any]:
        model = await self.model(serve.get_multiplexed_model_id())
        return {"output": answer(model, (await request.json())["input"])}


if __name__ == "__main__":
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    deployment: Any = Adapters
    serve.run(deployment.bind(sys.argv[1]))
    threading.Event().wait()
