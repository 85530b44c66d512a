"""MLServer's runtime for a model, and what starts it:

python -m benchmarks.tables.server_peers.mlserver_app DIRECTORY PORT
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlserver
from mlserver.codecs import NumpyCodec

from benchmarks.tables.server_peers.models import session


class Folded(mlserver.MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        self.session = session(Path(self.settings.parameters.uri))
        return True

    async def predict(self, payload: Any) -> Any:
        found = self.session.run(None, {"input": NumpyCodec.decode_input(payload.inputs[0])})[0]
        return mlserver.types.InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output("output", found)]
        )


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        found: int = bound.getsockname()[1]
        return found


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp())
    ports = {"http_port": int(sys.argv[2]), "grpc_port": _free_port(), "metrics_port": _free_port()}
    (place / "settings.json").write_text(json.dumps({"host": "127.0.0.1", **ports}))
    for path in Path(sys.argv[1]).glob("*.onnx"):
        (place / path.stem).mkdir()
        implementation = "benchmarks.tables.server_peers.mlserver_app.Folded"
        settings = {"name": path.stem, "implementation": implementation, "parameters": {"uri": str(path.resolve())}}
        (place / path.stem / "model-settings.json").write_text(json.dumps(settings))
    command = Path(sys.executable).with_name("mlserver")
    os.execve(command, [str(command), "start", str(place)], {**os.environ, "PYTHONPATH": str(Path.cwd())})
