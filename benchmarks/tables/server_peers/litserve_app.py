"""LitServe: python -m benchmarks.tables.server_peers.litserve_app DIRECTORY PORT"""

from __future__ import annotations

import sys
from typing import Any

import litserve

from benchmarks.tables.server_peers.models import Models


class Adapters(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, directory: str) -> None:
        super().__init__()
        self.directory = directory

    def setup(self, device: str) -> None:
        self.models = Models(self.directory)

    def predict(self, request: dict[str, Any]) -> list[list[float]]:
        return self.models.answer(request["task"], request["input"])

    def encode_response(self, output: list[list[float]]) -> dict[str, Any]:
        return {"output": output}


if __name__ == "__main__":
    server = litserve.LitServer(Adapters(sys.argv[1]), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False)
