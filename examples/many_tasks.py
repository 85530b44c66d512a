"""Serve many tasks: memory budgets, pins, folded sessions, weighted sets, and concurrent requests.

Run two_tasks.py first, in the same directory: it writes the bundle and the adapters.
"""

import asyncio

import numpy as np

from tpeft_deploy import Runtime
from tpeft_deploy.runtime import Limits

pixels = np.random.rand(3, 1, 16, 16).astype(np.float32)

# README begins
runtime = Runtime("bundle", device_bytes=2**26, host_bytes=2**28, limits=Limits(max_rows=16))
runtime.pin("rotated")  # never evicted from the device until unpin
runtime.pin("mirrored", folded=True)  # also gets a folded session, which is ready when this returns
runtime.load("third", "adapters/mirrored")  # any adapter; the bundle on disk is not changed
runtime.load("rotated")  # reload from the bundle on disk; still pinned
both = {"rotated": 0.7, "mirrored": 1.0}  # W + 0.7 dW + 1.0 dW'; accepted in place of a task name
runtime.prefetch(["third", both]).result()  # without .result(), in the background
print(runtime.residency())  # {"mirrored": "folded", "rotated": "device", "third": "device"}
tasks: list[str | dict[str, float]] = ["rotated", both, "base"]
mixed = runtime.run({"pixels": pixels}, tasks=tasks)


async def ask(row: int, task: str | dict[str, float]) -> np.ndarray:
    answers = await runtime.infer({"pixels": pixels[row : row + 1]}, task, timeout=30)
    logits: np.ndarray = answers["logits"][0]
    return logits


async def ask_all() -> list[np.ndarray]:
    return await asyncio.gather(*[ask(row, task) for row, task in enumerate(tasks)])


together = asyncio.run(ask_all())  # the requests share batches
runtime.unpin("mirrored")
runtime.unload("third")
# README ends
print("largest difference:", max(float(np.abs(a - b).max()) for a, b in zip(together, mixed["logits"], strict=True)))
runtime.close()
