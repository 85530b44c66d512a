"""The whole benchmark of one bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import onnxruntime

from tpeft_deploy.bundle.directory import MANIFEST, Bundle
from tpeft_deploy.errors import TpeftError
from tpeft_deploy.files import digest_file
from tpeft_deploy.progress import Progress, Stage, silent
from tpeft_deploy.runtime.bench.cases import PlainSessions, fold_copy, known_tasks, served
from tpeft_deploy.runtime.bench.crowd import Crowd
from tpeft_deploy.runtime.bench.generating import generation_costs
from tpeft_deploy.runtime.bench.measure import Case, interleave, resident_bytes, spread
from tpeft_deploy.runtime.bench.results import Benchmark, CaseCost, LeftOut, Memory, Switching
from tpeft_deploy.runtime.runtime import Runtime
from tpeft_deploy.runtime.sessions.providers import Cuda, choose

__all__ = ["bench_bundle"]

_COUNTS = (2, 10, 30, 100, 300)  # adapters known
_MOST_TASKS = 4  # that take turns
_RUNS, _GENERATION, _SWITCHES, _LOADS, _GROWTH = 0.5, 0.1, 0.15, 0.05, 0.2  # shares of the time
_ROWS = 4  # sequences that are generated together


def bench_bundle(
    bundle: Bundle,
    *,
    provider: str = "auto",
    rows: Sequence[int] = (1, 8, 16),
    seconds: float = 20.0,
    threads: int | None = None,
    allow_tf32: bool = False,
    progress: Progress = silent,
) -> Benchmark:
    """Measure what serving a bundle costs.

    Cases take turns in rounds, each in another order, so that ratios hold on a busy machine too.

    Args:
        bundle: opened; nothing in it is changed.
        provider: as `Runtime` takes it.
        rows: batch sizes.
        seconds: for everything, about; every case has five rounds however long they take.
        threads: intra-op threads of the sessions; by default one per core.
        allow_tf32: as `Runtime` takes it.
        progress: told each stage.

    Raises:
        InputError: a batch size that the model does not take.
        BundleError, ProviderUnavailable: it cannot be served here.
    """
    progress(Stage("open the sessions", 0, _stages(rows, len(bundle.components))))
    memory = [Memory("at the start", resident_bytes())]
    choice = choose(provider, allow_tf32=allow_tf32)
    plain = {
        name: PlainSessions(part, choice, threads, Cuda(tf32=allow_tf32)) for name, part in bundle.components.items()
    }
    memory.append(Memory("with a plain session", resident_bytes()))
    with Runtime(bundle.path, provider=provider, threads=threads, allow_tf32=allow_tf32) as runtime:
        memory.append(Memory(f"with the runtime beside it, {len(runtime.tasks)} tasks", resident_bytes()))
        return _measured(bundle, runtime, plain, rows, seconds, threads, memory, progress)


def _measured(
    bundle: Bundle,
    runtime: Runtime,
    plain: Mapping[str, PlainSessions],
    rows: Sequence[int],
    seconds: float,
    threads: int | None,
    memory: list[Memory],
    progress: Progress,
) -> Benchmark:
    stages = _stages(rows, len(plain))
    names = {name: name if bundle.parts else None for name in plain}
    tasks = known_tasks(bundle, _MOST_TASKS)
    left_out: list[LeftOut] = []
    folded = fold_copy(bundle, runtime)
    if isinstance(folded, TpeftError):
        left_out.append(LeftOut("folded", str(folded)))
        folded = None
    if folded is not None:
        memory.append(Memory("with a folded task", resident_bytes()))
    costs: list[CaseCost] = []
    for place, (name, count) in enumerate(product(plain, rows)):
        progress(Stage(f"batches of {count}{f', {name}' if bundle.parts else ''}", 1 + place, stages))
        cases = served(bundle.components[name], runtime, plain[name], tasks, folded, count, names[name])
        share = seconds * _RUNS / len(rows) / len(plain)
        costs += [replace(cost, component=names[name] or "") for cost in _costs(cases, count, share)]
    progress(Stage("generate", stages - len(_COUNTS) - 2, stages))
    generated = [] if runtime.only_folded else generation_costs(bundle, runtime, tasks, _ROWS, seconds * _GENERATION)
    if folded is not None:
        runtime.unload(folded)
    switching: list[Switching] = []
    cold = None
    if bundle.tasks and not runtime.only_folded:
        crowd = Crowd(bundle, runtime, min(rows), next(iter(names.values())))
        progress(Stage("load from disk", stages - len(_COUNTS) - 1, stages))
        cold = crowd.cold_load(seconds * _LOADS)
        for place, count in enumerate(_COUNTS):
            progress(Stage(f"{count} adapters", stages - len(_COUNTS) + place, stages))
            obstacle = crowd.grow(count, seconds * _GROWTH)
            if obstacle is not None:
                left_out.append(LeftOut(f"{count} adapters", obstacle))
                break
            switching.append(crowd.switching(seconds * _SWITCHES / len(_COUNTS)))
        memory.append(Memory(f"with {len(runtime.tasks)} tasks", resident_bytes()))
    left_out += _left_out(bundle, runtime, next(iter(plain.values())))
    return Benchmark(
        bundle.manifest.name,
        digest_file(bundle.path / MANIFEST),
        runtime.provider,
        runtime.provider_reason,
        threads,
        onnxruntime.__version__,
        tasks,
        costs,
        switching,
        cold,
        memory,
        runtime.usage(),
        left_out,
        generated,
    )


def _left_out(bundle: Bundle, runtime: Runtime, plain: PlainSessions) -> list[LeftOut]:
    if not bundle.tasks:
        return [LeftOut("everything but plain and base", "the bundle has no tasks")]
    if runtime.only_folded:
        return [LeftOut("everything but plain, base and folded", runtime.provider_reason)]
    return [] if plain.has_factored else [LeftOut("factored", f"{runtime.provider} compiles factors as constants")]


def _stages(rows: Sequence[int], components: int) -> int:
    return components * len(rows) + len(_COUNTS) + 3


def _costs(cases: Mapping[str, Case], rows: int, seconds: float) -> list[CaseCost]:
    times = interleave(cases, seconds)
    return [
        CaseCost(
            name,
            rows,
            spread([1e3 * second for second in own]),
            spread([a / b for a, b in zip(own, times["plain"], strict=True)]),
            len(own),
        )
        for name, own in times.items()
    ]
