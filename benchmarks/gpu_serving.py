"""The encoder and the conv net as they are served: answers against the CPU's, and what rows of adapters cost."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from benchmarks.gpu_fixed import Fixed, Place, Report, Value, device_bytes, error, interleaved, normal
from benchmarks.gpu_questions import tokens
from tpeft_deploy import Adapter, Bundle, Runtime, TuckerDelta
from tpeft_deploy.bundle.directory import BANKED_CUDA
from tpeft_deploy.errors import TpeftError
from tpeft_deploy.runtime.adapters import device_rows
from tpeft_deploy.runtime.adapters.bank import Bank, Layout, Rows
from tpeft_deploy.runtime.sessions.banked import Session
from tpeft_deploy.runtime.sessions.cuda_graph import Captured, Policy
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.plain import Plain
from tpeft_deploy.runtime.sessions.providers import ORT_ERRORS, Choice, Cuda, open_session
from tpeft_deploy.runtime.sessions.served_graphs import ServedGraphs, factored_graph
from tpeft_deploy.runtime.sessions.shape_buckets import Buckets
from tpeft_deploy.tucker import Array

ROWS = 32
CPU = Choice("cpu", "to compare with")


def adapter(bundle: Bundle, seed: int, rank: int = 8) -> Adapter:
    """A random adapter of all weights that take one."""
    deltas = {}
    for place, target in enumerate(bundle.manifest.targets):
        ranks = tuple(min(rank, size) for size in target.shape)
        factors = tuple(
            normal(size, own, seed=seed * 1000 + place, scale=size**-0.5) if own < size else None
            for size, own in zip(target.shape, ranks, strict=True)
        )
        deltas[target.name] = TuckerDelta(normal(*ranks, seed=seed, scale=0.3), factors, 0.7)
    return Adapter(deltas)


def bank_of(
    bundle: Bundle, count: int, device: str, rank: int = 8, *, file: str | None = None
) -> tuple[Bank, list[Rows]]:
    """A bank with this many adapters in rows 1 and on, and what is in each, for the device's graph or another one."""
    file = graph_of(bundle, device) if file is None else file
    layout = Layout.of(bundle, bundle.manifest.packing if file == BANKED_CUDA else ())
    rows = [layout.rows(bundle.feeds(adapter(bundle, seed, rank))) for seed in range(count)]
    shapes = layout.widest({name: array.shape for name, array in row.items()} for row in rows)
    bank = Bank.allocate(layout, shapes, count + 1, device)
    for number, row in enumerate(rows, 1):
        bank.write(number, row)
    return bank, rows


def graph_of(bundle: Bundle, device: str) -> str:
    """The banked graph that a device runs."""
    return ServedGraphs.on(device, bundle.manifest).banked


def answers(name: str) -> Callable[[Place], Report]:
    """Every form of a bundle on the device against the CPU."""

    def ask(place: Place) -> Report:
        report, path = Report(), place.path / name
        batch = {"input": normal(3, 3, 32, 32)} if name == "convs" else tokens(3)
        rounding = Bundle.open(path).manifest.rounding
        limit = max(rounding.limits.values()) if rounding else 1e-5
        with Runtime(path, provider=place.choice.device) as device, Runtime(path, provider="cpu") as cpu:
            (output,) = (port.name for port in Bundle.open(path).manifest.outputs)

            def compare(form: str, run: Callable[[Runtime], Iterable[Array]]) -> None:
                got, expected = (np.stack(list(run(runtime))) for runtime in (device, cpu))
                report.claim(f"{name}, {form}, answers as on the CPU", error(got, expected), limit, at_least=False)

            compare("base", lambda runtime: runtime.run(batch)[output])
            compare("one task", lambda runtime: runtime.run(batch, "one")[output])
            tasks = ["two" if "two" in device.tasks else "one", "base", "one"]
            compare("a task per row", lambda runtime: runtime.run(batch, tasks=tasks)[output])
            try:
                device.pin("one", folded=True)
            except TpeftError as found:  # the fold was not proved: an answer too
                report.figures[f"{name}, folded"] = str(found)[:200]
            else:
                compare("folded", lambda runtime: runtime.run(batch, "one")[output])
        return report

    return ask


def recorded_answers(place: Place) -> Report:
    """Recorded runs at several shapes, on rows that are written and banks that change, against the CPU."""
    report, bundle = Report(), Bundle.open(place.path / "encoder")
    model, manifest = bundle.path / graph_of(bundle, place.choice.device), bundle.manifest
    plain, (on_cpu, _) = Session(bundle.path / "banked.onnx", SessionFactory(CPU)), bank_of(bundle, 3, "cpu")
    recorded = Captured(model, SessionFactory(place.choice), manifest, buckets=Buckets(manifest, lengths=[16, 64]))
    worst = 0.0
    for generation in range(2):
        bank, _ = bank_of(bundle, 3, place.choice.device)
        for time in range(4):
            for count, length in ((1, 9), (3, 16), (4, 50)):
                inputs, index = tokens(count, length, seed=time), np.array([3, 1, 0, 2][:count])
                got, expected = recorded.run(bank, inputs, index), plain.run(on_cpu, inputs, index)
                worst = max(worst, *(error(got[name], expected[name]) for name in expected))
        report.figures[f"bank {generation}: worst error so far"] = worst
    bank.write(1, bank_of(bundle, 2, place.choice.device)[1][1])
    inputs = tokens(1, 9)
    got, expected = (run.run(b, inputs, np.array([i])) for run, b, i in ((recorded, bank, 1), (plain, on_cpu, 2)))
    worst = max(worst, *(error(got[name], expected[name]) for name in expected))
    recorded.close()
    report.claim("recorded runs answer as the CPU", worst, 1e-5, at_least=False)
    return report


def mixed_rows(name: str) -> Callable[[Place], Report]:
    """32 rows of 32 adapters against 32 rows of the base, and against 32 rows one after the other."""
    return lambda place: _mixed_rows(place, Bundle.open(place.path / name))


def _mixed_rows(place: Place, bundle: Bundle) -> Report:
    report, device = Report(), place.choice.device
    inputs, single, each = tokens(ROWS), tokens(1), np.arange(1, ROWS + 1)
    files = dict.fromkeys((graph_of(bundle, device), "banked.onnx"))
    banks = {file: bank_of(bundle, ROWS, device, file=file)[0].values for file in files}
    first = next(iter(files))
    for way, graphs in place.ways.items():

        def fixed(file: str, fed: Mapping[str, Value], graphs: bool = graphs) -> Fixed:
            return Fixed(place, place.open(bundle.path / file, graphs=graphs), fed, graphs=graphs)

        rows = fixed(first, {**banks[first], **single, "adapter_index": each[:1]})
        mixed = {file: fixed(file, {**bank, **inputs, "adapter_index": each}) for file, bank in banks.items()}
        calls: dict[str, Callable[[], object]] = {"base": fixed("base.onnx", inputs), **mixed}
        calls["one by one"] = lambda rows=rows: _one_by_one(rows, each)  # type: ignore[misc]
        times = interleaved(calls, place.seconds)
        report.milliseconds({f"{name}, {ROWS} rows, {way}": own for name, own in times.items()})
        for file in files:
            report.figures[f"throughput over the base's, {file}, {way}"] = times["base"] / times[file]
        if graphs:
            report.claim("throughput over the base's, recorded", times["base"] / times[first], 0.9, at_least=True)
            ratio = times["one by one"] / times[first]
            report.claim("throughput over the switched rows', recorded", ratio, 5, at_least=True)
    return report


def _one_by_one(rows: Fixed, each: Array) -> None:
    for row in each:
        device_rows.write(rows.inputs["adapter_index"], np.array([row]))
        rows()


def served_rows(place: Place) -> Report:
    """The same with everything that a request goes through: padding, copies to and from the device, threads."""
    report, bundle = Report(), Bundle.open(place.path / "encoder")
    bank, _ = bank_of(bundle, ROWS, place.choice.device)
    inputs, each, file = tokens(ROWS), np.arange(1, ROWS + 1), bundle.path / graph_of(bundle, place.choice.device)
    base, plain = (
        Plain(bundle.path / "base.onnx", SessionFactory(place.choice)),
        Session(file, SessionFactory(place.choice)),
    )
    recorded = Captured(file, SessionFactory(place.choice), bundle.manifest)
    calls: dict[str, Callable[[], object]] = {
        "base": lambda: base.run(inputs),
        "32 adapters": lambda: plain.run(bank, inputs, each),
        "32 adapters, recorded": lambda: recorded.run(bank, inputs, each),
        "1 row": lambda: plain.run(bank, tokens(1), each[:1]),
        "1 row, recorded": lambda: recorded.run(bank, tokens(1), each[:1]),
    }
    report.milliseconds(interleaved(calls, place.seconds))
    recorded.close()
    return report


def factored(name: str) -> Callable[[Place], Report]:
    """One adapter through its factors against the base, 8 rows."""
    return lambda place: _factored(place, Bundle.open(place.path / name))


def _factored(place: Place, bundle: Bundle) -> Report:
    report = Report()
    file = factored_graph(place.choice.provider, bundle.manifest)
    inputs, factors = tokens(8), bundle.factors("one", file)
    for way, graphs in place.ways.items():
        calls = {
            "base": Fixed(place, bundle.path / "base.onnx", inputs, graphs=graphs),
            "factored": Fixed(place, bundle.path / file, {**inputs, **factors}, graphs=graphs),
        }
        times = interleaved(calls, place.seconds)
        report.milliseconds({f"{name}, 8 rows, {way}": own for name, own in times.items()})
        ratio = times["factored"] / times["base"]
        report.figures[f"factored / base, {way}"] = ratio
        if place.cuda:
            report.claim(f"factored / base, {way}", ratio, 1.1, at_least=False)
    return report


def switching(place: Place) -> Report:
    """Writing one adapter into a row of a bank of 33."""
    report, bundle = Report(), Bundle.open(place.path / "encoder")
    before = device_bytes() if place.cuda else 0
    bank, rows = bank_of(bundle, ROWS, place.choice.device)
    report.figures |= {"tensors": float(len(bank.values)), "bytes": float(bank.row_bytes)}
    if place.cuda:
        report.figures |= {"bank, MiB": bank.nbytes / 2**20, "device, MiB": (device_bytes() - before) / 2**20}
    kept = {name: value.numpy().copy() for name, value in bank.values.items()}
    bank.write(7, rows[3])
    other = [row for row in range(ROWS + 1) if row != 7]
    same = all(np.array_equal(value.numpy()[other], kept[name][other]) for name, value in bank.values.items())
    report.claim("other rows stay as they are", float(same), 1, at_least=True)
    report.milliseconds(interleaved({"write a row": lambda: bank.write(7, rows[3])}, place.seconds))
    return report


def memory_limit(place: Place) -> Report:
    """A limit that is too low refuses, and does not take the memory."""
    place.need_cuda()
    report, model = Report(), place.path / "encoder" / "base.onnx"
    before = device_bytes()
    try:
        session = open_session(model, place.choice, cuda=Cuda(memory_bytes=8 * 2**20))
        session.run(None, tokens(64))
    except (RuntimeError, *ORT_ERRORS) as found:
        report.figures["refusal"] = str(found).strip().splitlines()[0][:160]
    report.claim("a session above 8 MiB is refused", float("refusal" in report.figures), 1, at_least=True)
    report.figures["taken meanwhile, MiB"] = (device_bytes() - before) / 2**20
    session = open_session(model, place.choice, cuda=Cuda(memory_bytes=2**30))
    got = session.get_provider_options()["CUDAExecutionProvider"]
    same = all(got.get(name) == value for name, value in Cuda(memory_bytes=2**30).options().items())
    report.claim("the options arrive", float(same), 1, at_least=True)
    return report


def recording_among_others(place: Place) -> Report:
    """Recording while other threads write rows and run sessions of their own: does either spoil the other?"""
    report, bundle = Report(), Bundle.open(place.path / "encoder")
    bank, rows = bank_of(bundle, 3, place.choice.device)
    recorded = Captured(
        bundle.path / graph_of(bundle, place.choice.device), SessionFactory(place.choice), bundle.manifest
    )
    failures: list[str] = []

    def write() -> None:
        bank.write(3, rows[0])

    def fold() -> None:
        Plain(bundle.path / "base.onnx", SessionFactory(place.choice)).run(tokens(2))

    with _meanwhile(write, failures), _meanwhile(fold, failures):
        for length in range(8, 24):
            for _ in range(Policy().patience + 3):  # enough for the recording, however often it is put off
                try:
                    recorded.run(bank, tokens(2, length), np.array([1, 2]))
                except Exception as found:  # counted
                    failures.append(f"record: {str(found).splitlines()[0][:160]}")
    recordings = recorded.recordings
    recorded.close()
    if place.cuda:
        report.claim("shapes recorded, of 16", recordings, 16, at_least=True)
    report.figures |= {f"failure {n}": text for n, text in enumerate(dict.fromkeys(failures))}
    report.claim("failures while recording", len(failures), 0, at_least=False)
    return report


@contextlib.contextmanager
def _meanwhile(call: Callable[[], None], failures: list[str]) -> Iterator[None]:
    done = threading.Event()

    def repeat() -> None:
        while not done.is_set():
            try:
                call()
            except Exception as found:  # counted
                failures.append(f"{call.__name__}: {str(found).splitlines()[0][:160]}")

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
