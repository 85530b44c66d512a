from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.manifest import Manifest, Port
from tpeft_deploy.runtime.adapters.bank import Bank
from tpeft_deploy.runtime.adapters.held import Held
from tpeft_deploy.runtime.adapters.version import Version, adapters
from tpeft_deploy.runtime.batching.calls import Answered, InferOptions
from tpeft_deploy.runtime.batching.collate import Outputs
from tpeft_deploy.runtime.batching.policy import Limits
from tpeft_deploy.runtime.batching.worker import Batcher
from tpeft_deploy.tucker import Array

NamedEngine = Callable[[Mapping[str, Array], Sequence[str], Any], Outputs]


@cache
def version(name: str) -> Version:
    """The one version of a name, never read."""

    def never() -> Adapter:
        raise AssertionError("read")

    return Version(name, "", never)


class Counts:
    """Counts references as `Residency` does, without a device."""

    def acquire(self, versions: Sequence[Version]) -> Held:
        for one in adapters(versions):
            one.users += 1
        return Held(versions, self.rows, self.release)

    def rows(self, versions: Iterable[Version]) -> tuple[Bank, list[int]]:
        raise AssertionError("there is no bank")

    def release(self, versions: Iterable[Version]) -> None:
        for one in versions:
            one.users -= 1


class NamedBatcher(Batcher):
    """A batcher of tasks by name, with an engine that gets names and finds their versions acquired."""

    def __init__(self, manifest: Manifest, engine: NamedEngine, limits: Limits, **more: Any) -> None:
        def run_batch(inputs: Mapping[str, Array], versions: Sequence[Version], options: Any) -> Outputs:
            assert all(one.users > 0 for one in versions)
            return engine(inputs, [one.name for one in versions], options)

        super().__init__(manifest, run_batch, limits, **more)
        self._ports = manifest.outputs

    async def infer(  # type: ignore[override]
        self,
        inputs: Mapping[str, Array],
        task: str = "base",
        *,
        tasks: Sequence[str] | None = None,
        outputs: Sequence[Port] | None = None,
        **more: Any,
    ) -> Answered:
        options = InferOptions(self._ports if outputs is None else outputs, tasks is not None, **more)
        held = Counts().acquire([version(name) for name in tasks or [task]])
        try:
            return await super().infer(inputs, held, options)
        finally:
            assert not held.counted or any(held in run.left for run in self._runs.values())
