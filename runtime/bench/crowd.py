"""A runtime that comes to know more and more adapters: what one costs to load, and to switch to."""

from __future__ import annotations

import time

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.formats import canonical
from tpeft_deploy.runtime.bench.cases import batch, free_name, taking_turns
from tpeft_deploy.runtime.bench.measure import interleave, spread
from tpeft_deploy.runtime.bench.results import ColdLoad, Switching
from tpeft_deploy.runtime.runtime import Runtime

__all__ = ["Crowd"]

_BYTES = 512 << 20  # of adapters loaded for the sake of their number
_FEWEST, _MOST = 5, 200  # loads


class Crowd:
    """Adapters of a bundle under many names.

    Args:
        bundle: has a task at least.
        runtime: serves it; loads go there.
        rows: rows of each batch.
        component: component that runs, where there are several.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, rows: int, component: str | None = None) -> None:
        self._bundle, self._runtime, self._component = bundle, runtime, component
        self._inputs = batch(bundle if component is None else bundle.components[component], rows)
        # The largest adapter stands for all.
        self._task = max(bundle.tasks, key=self._file_bytes)
        self._adapter = bundle.adapter(self._task)
        tensors = bundle.fill(self._adapter).values()
        self._bytes = sum(array.nbytes for slots in tensors for array in slots.values())
        self._known = [self._task]

    def cold_load(self, seconds: float) -> ColdLoad:
        """Unload a task, load it from the bundle again and run it once, repeatedly."""
        loads: list[float] = []
        runs: list[float] = []
        end = time.perf_counter() + seconds
        while len(loads) < _MOST and (len(loads) < _FEWEST or time.perf_counter() < end):
            self._runtime.unload(self._task)
            start = time.perf_counter()
            self._runtime.load(self._task)
            loaded = time.perf_counter()
            self._run()
            loads.append(1e3 * (loaded - start))
            runs.append(1e3 * (time.perf_counter() - loaded))
        return ColdLoad(self._task, self._file_bytes(self._task), spread(loads), spread(runs), len(loads))

    def grow(self, count: int, seconds: float) -> str | None:
        """Load copies until tasks of that number take turns, or say why not."""
        if count * self._bytes > _BYTES:
            return f"they take {count * self._bytes >> 20} MiB, more than the {_BYTES >> 20} that this measures with"
        end = time.perf_counter() + seconds
        for number in range(len(self._known), count):
            if time.perf_counter() > end:
                return f"loading them takes longer than {seconds:.2g} s: {number} were loaded by then"
            name = free_name(self._bundle, f"copy-{number}")
            self._runtime.load(name, self._adapter)
            self._known.append(name)
        return None

    def switching(self, seconds: float) -> Switching:
        """Another task every run against the same task again; two must have been loaded."""
        cases = {
            "repeated": self._run,
            "switched": taking_turns(self._runtime, self._known, self._inputs, self._component),
        }
        times = interleave(cases, seconds)
        pairs = list(zip(times["repeated"], times["switched"], strict=True))
        return Switching(
            len(self._known),
            spread([1e3 * repeated for repeated, _ in pairs]),
            spread([1e3 * switched for _, switched in pairs]),
            spread([1e6 * (switched - repeated) for repeated, switched in pairs]),
            spread([switched / repeated for repeated, switched in pairs]),
        )

    def _run(self) -> None:
        self._runtime.run(self._inputs, self._task, component=self._component)

    def _file_bytes(self, task: str) -> int:
        digest = self._bundle.digest(task)
        return (self._bundle.path / "adapters" / task / digest / canonical.FILE).stat().st_size
