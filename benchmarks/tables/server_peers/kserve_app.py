"""KServe's SDK: python -m benchmarks.tables.server_peers.kserve_app DIRECTORY PORT"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import kserve

from benchmarks.tables.server_peers.models import session


class Folded(kserve.Model):  # type: ignore[misc]
    def __init__(self, path: Path) -> None:
        super().__init__(path.stem)
        self.session = session(path)
        self.ready = True

    def predict(self, payload: Any, *_: Any, **__: Any) -> Any:
        found = self.session.run(None, {"input": payload.inputs[0].as_numpy()})[0]
        output = kserve.InferOutput("output", list(found.shape), "FP32")
        output.set_data_from_numpy(found, binary_data=False)
        return kserve.InferResponse(payload.id or "", self.name, [output])


if __name__ == "__main__":
    models = [Folded(path) for path in sorted(Path(sys.argv[1]).glob("*.onnx"))]
    kserve.ModelServer(http_port=int(sys.argv[2]), enable_grpc=False).start(models)
