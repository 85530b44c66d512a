"""Many threads, many adapters, changes all the time: every row is checked against its own adapter's reference."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tpeft_deploy import Adapter, Bundle, Runtime, TuckerDelta, export_bundle
from tpeft_deploy.errors import UnknownTask

WIDTH, HIDDEN, CLASSES = 12, 24, 6
LIMIT = 1e-5
Weights = tuple[np.ndarray, np.ndarray]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, CLASSES, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.head(torch.tanh(self.inner(x)))
        return answer


def make(seed: int, base: Weights) -> tuple[Adapter, Weights]:
    """An adapter and the weights it leads to; every fifth has a head of its own, of another size."""
    rng = np.random.default_rng(seed)
    rank = 1 + seed % 3
    core, up, down = (rng.standard_normal(s) for s in ((rank, rank), (HIDDEN, rank), (WIDTH, rank)))
    delta = TuckerDelta(core.astype("f4"), (up.astype("f4"), down.astype("f4")), scale=0.3)
    head = base[1]
    overrides = {}
    if seed % 5 == 0:
        head = rng.standard_normal((2 + seed % 7, HIDDEN)).astype("f4")
        overrides = {"head.weight": head}
    return Adapter({"inner.weight": delta}, overrides), (base[0] + delta.dense(), head.astype("f8"))


def reference(weights: Weights, row: np.ndarray) -> tuple[np.ndarray, float]:
    """The answer in float64, and how large what it sums up is: it may itself be next to nothing."""
    hidden = np.tanh(row.astype("f8") @ weights[0].T)
    return hidden @ weights[1].T, float(np.linalg.norm(np.abs(hidden) @ np.abs(weights[1]).T))


@dataclass
class Report:
    rows: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    changes: dict[str, int] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)  # resident bytes, sampled evenly


class Stress:
    """One run of it.

    Args:
        place: for the bundle.
        adapters: how many are on disk.
        resident: about how many of them the device takes.
    """

    def __init__(self, place: Path, *, adapters: int, resident: int) -> None:
        torch.manual_seed(0)
        net = Net()
        self.base = (net.inner.weight.detach().double().numpy(), net.head.weight.detach().double().numpy())
        made = {f"t{seed}": make(seed, self.base) for seed in range(adapters)}
        first = {task: made[task][0] for task in ("t0", "t1", "t2")}
        bundle: Bundle = export_bundle(net, first, place, example_inputs={"x": torch.randn(3, WIDTH)})
        for task, (adapter, _) in made.items():
            if task not in first:
                bundle.add(task, adapter)
        probe = Runtime(place, provider="cpu", threads=1)
        row_bytes = probe.usage()["device_bytes"] // (probe.usage()["rows"] + 1)
        probe.close()
        self.runtime = Runtime(
            place,
            provider="cpu",
            threads=1,
            device_bytes=(resident + 1) * row_bytes,
            host_bytes=resident * row_bytes // 4,
            preload=False,
        )
        self.fixed = {"base": self.base} | {task: weights for task, (_, weights) in made.items()}
        self.names = list(made)
        # Guests are replaced all the time: (versions that may answer, by number).
        self.guests: dict[str, dict[int, Weights]] = {}
        self.begun: dict[str, int] = {}
        self.published: dict[str, int] = {}
        self.report = Report()
        self._done = threading.Event()
        self._lock = threading.Lock()
        for guest in range(4):
            self._replace(f"g{guest}")

    def run(self, rows: int, *, threads: int = 8) -> Report:
        """Serve that many rows while tasks are loaded, replaced, unloaded, folded and unfolded."""
        share = rows // threads
        callers = [threading.Thread(target=self._guard, args=(self._call, seed, share)) for seed in range(threads)]
        changer = threading.Thread(target=self._guard, args=(self._change,))
        sampler = threading.Thread(target=self._guard, args=(self._sample, rows))
        for thread in (*callers, changer, sampler):
            thread.start()
        for thread in callers:
            thread.join()
        self._done.set()
        changer.join()
        sampler.join()
        self.runtime.close()
        return self.report

    def _guard(self, work: object, *arguments: object) -> None:
        try:
            work(*arguments)  # type: ignore[operator]
        except Exception as error:  # whatever it is, it belongs into the report
            self.report.errors.append(repr(error))

    def _call(self, seed: int, rows: int) -> None:
        rng = np.random.default_rng(seed)
        served = 0
        while served < rows:
            count = int(rng.integers(1, 64))
            inputs = rng.standard_normal((count, WIDTH)).astype("f4")
            one = rng.random() < 0.2
            tasks = [self._pick(rng)] * count if one else [self._pick(rng) for _ in range(count)]
            before = {task: self.published[task] for task in set(tasks) & set(self.begun)}
            if one:
                answers = list(self.runtime.run({"x": inputs}, tasks[0])["output"])
            else:
                answers = list(self.runtime.run({"x": inputs}, tasks=tasks)["output"])
            for row, task in enumerate(tasks):
                self._check(task, inputs[row], answers[row], before.get(task))
            served += count
            with self._lock:
                self.report.rows += count

    def _pick(self, rng: np.random.Generator) -> str:
        kind = rng.random()
        if kind < 0.05:
            return "base"
        if kind < 0.10:
            return f"g{rng.integers(4)}"
        # A few are asked for most of the time, as tasks are.
        return self.names[min(int(rng.zipf(1.6)) - 1, len(self.names) - 1)]

    def _check(self, task: str, row: np.ndarray, answer: np.ndarray, before: int | None) -> None:
        if before is None:
            allowed = [self.fixed[task]]
        else:
            versions = self.guests[task]
            allowed = [versions[number] for number in range(before, self.begun[task] + 1) if number in versions]
        errors = []
        for weights in allowed:
            wanted, size = reference(weights, row)
            errors.append(float(np.linalg.norm(answer - wanted)) / size if wanted.shape == answer.shape else np.inf)
        if min(errors) > LIMIT:
            self.report.wrong.append(f"{task}: {errors}")

    def _replace(self, guest: str) -> None:
        number = self.begun.get(guest, -1) + 1
        adapter, weights = make(10_000 + 97 * number + int(guest[1:]), self.base)
        self.guests.setdefault(guest, {})[number] = weights
        self.guests[guest].pop(number - 50, None)  # no run lasts as long as fifty replacements
        self.begun[guest] = number
        self.runtime.load(guest, adapter)
        self.published[guest] = number

    def _change(self) -> None:
        rng = np.random.default_rng(99)
        while not self._done.is_set():
            change = str(rng.choice(["replace", "come and go", "fold", "pin", "prefetch", "set"]))
            self.report.changes[change] = self.report.changes.get(change, 0) + 1
            task = self.names[int(rng.integers(8))]
            if change == "replace":
                self._replace(f"g{rng.integers(4)}")
            elif change == "come and go":
                self._come_and_go()
            elif change == "fold":
                self.runtime.pin(task, folded=True)
                time.sleep(0.01)
                self.runtime.unpin(task)
            elif change == "pin":
                self.runtime.pin(task)
                self.runtime.unpin(task)
            elif change == "prefetch":
                self.runtime.prefetch([self.names[int(rng.integers(len(self.names)))]]).result()
            else:
                self._weighted(rng)
            time.sleep(0.002)

    def _come_and_go(self) -> None:
        adapter, weights = make(77, self.base)
        row = np.ones(WIDTH, "f4")
        self.runtime.load("visitor", adapter)
        self.fixed["visitor"] = weights
        self._check("visitor", row, self.runtime.run({"x": row[None]}, "visitor")["output"][0], None)
        self.runtime.unload("visitor")
        try:
            self.runtime.run({"x": row[None]}, "visitor")
        except UnknownTask:
            return
        self.report.wrong.append("a task that was unloaded")

    def _weighted(self, rng: np.random.Generator) -> None:
        first, second = "t1", "t2"
        strengths = {first: float(rng.choice([0.5, 2.0])), second: -1.0}
        row = rng.standard_normal(WIDTH).astype("f4")
        changes = [strengths[task] * (self.fixed[task][0] - self.base[0]) for task in (first, second)]
        self.fixed["set"] = (self.base[0] + changes[0] + changes[1], self.base[1])
        self._check("set", row, self.runtime.run({"x": row[None]}, strengths)["output"][0], None)

    def _sample(self, rows: int) -> None:
        while not self._done.is_set():
            if self.report.rows >= len(self.report.memory) * rows / 100:
                self.report.memory.append(resident_bytes())
            time.sleep(0.005)


def resident_bytes() -> int:
    """What of this process is in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
