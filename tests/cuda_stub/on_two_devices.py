"""Serves a bundle on both of the stub's devices; prints what is said of a third, which is not there.

LD_LIBRARY_PATH=STUB CUDA_STUB_LOG=FILE STUB/venv/bin/python -m tests.cuda_stub.on_two_devices BUNDLE
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from tests.cuda_stub.on_stub import Log
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.errors import ProviderUnavailable
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.replica import Replica
from tpeft_deploy.tucker import Array


def copied(replica: Replica, version: Version, inputs: dict[str, Array]) -> dict[str, int]:
    """Bytes that a warm run copies between host and device."""
    log = Log()
    for _ in range(2):
        log.take()
        replica.engine.run_one(inputs, replica.own([version])[0])
    return {kind: size for kind, size in log.take().items() if kind.endswith(" bytes")}


def main(path: str) -> None:
    """Serve every task on both devices, alone and from the queue."""
    inputs = Bundle.open(path).example()
    with Runtime(path, provider="cuda", devices=[0, 1]) as runtime:
        tasks, replicas = [*runtime.tasks, "base"], runtime._part(None).replicas
        for task in runtime.tasks:
            runtime.pin(task)

        async def ask() -> None:
            await asyncio.gather(*(runtime.infer(inputs, task) for task in 4 * tasks))

        for task in tasks:
            runtime.run(inputs, task)
            runtime.run(inputs, task)
        asyncio.run(ask())
        found: dict[str, Any] = {
            "rows": [runtime.usage(place)["rows_taken"] for place in (0, 1)],
            "copied": [copied(replica, runtime._versions.find(tasks[0]), inputs) for replica in replicas],
        }
    with Runtime(path, provider="cuda") as runtime:
        replica = runtime._part(None).replicas[0]
        found["alone"] = copied(replica, runtime._versions.find(runtime.tasks[0]), inputs)
    try:
        Runtime(path, provider="cuda", devices=[0, 2])
    except ProviderUnavailable as error:
        found["third"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
