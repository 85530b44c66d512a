"""The questions about CUDA that a CPU cannot answer, one function each; `benchmarks.gpu` runs them apart."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks.gpu_fixed import Fixed, Place, Report, device_bytes, error, interleaved, normal
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.adapters import device_rows
from tpeft_deploy.runtime.sessions import onnx_bytes
from tpeft_deploy.runtime.sessions.providers import Cuda, open_session
from tpeft_deploy.tucker import Array

RANKS = ("matmul", "gemm", "fused", "banked", "conv")


def rank_zero(kind: str) -> Callable[[Place], Report]:
    """(a) Does a branch of rank 0 change nothing, as one of rank 8 of zeros does?"""

    def ask(place: Place) -> Report:
        report = Report()
        for rank in (8, 0):
            fed, base = _branch(kind, rank)
            for way, graphs in place.ways.items():
                run = Fixed(place, place.graph(f"rank_{kind}"), fed, graphs=graphs)
                run()  # the one that is recorded
                report.claim(f"rank {rank} {kind}, {way}: error", error(run.answer(), base), 1e-6, at_least=False)
        return report

    return ask


def _branch(kind: str, rank: int) -> tuple[dict[str, Array], Array]:
    """What to feed, and the base's answer by numpy."""
    zeros = np.zeros
    if kind == "conv":
        x, w = normal(2, 16, 8, 8), normal(24, 16, 3, 3)
        fed = {"x": x, "w": w, "down": zeros((rank, 16, 1, 1), np.float32)}
        fed |= {"core": zeros((rank, rank, 3, 3), np.float32), "up": zeros((24, rank, 1, 1), np.float32)}
        padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        return fed, np.einsum("nihwkl,oikl->nohw", windows, w.astype(np.float64))
    x, w = normal(6, 5, 64) if kind == "banked" else normal(6, 64), normal(64, 32)
    rows = (3,) if kind == "banked" else ()
    fed = {"x": x, "w": w, "down": zeros((*rows, 64, rank), np.float32), "up": zeros((*rows, rank, 32), np.float32)}
    if rows:
        fed["ids"] = np.arange(6) % 3
    return fed, x.astype(np.float64) @ w.astype(np.float64)


def hot_fold(place: Place) -> Report:
    """(b) A session that writes weights which another, recorded one reads: is every answer the new weights'?"""
    report = Report()
    base = {f"w{i}": normal(512, 512, seed=i, scale=0.04) for i in range(8)}
    values = {name: place.on_device(np.zeros_like(array)) for name, array in base.items()}
    adapters = [(normal(512, 8, seed=9 + k, scale=0.1), normal(8, 512, seed=99 + k, scale=0.1)) for k in range(4)]
    x = normal(64, 512)
    main = Fixed(place, place.graph("fold_main"), {"x": x, **values}, graphs=True)
    outputs = {f"v{i}": values[f"w{i}"] for i in range(8)}
    fed = {**base, "down": adapters[0][0], "up": adapters[0][1]}
    fold = Fixed(place, place.graph("fold_fold"), fed, outputs=outputs, graphs=True)
    worst, wrong, rounds = 0.0, 0, 100
    expected = [_products(x, base, down @ up) for down, up in adapters]
    for turn in range(rounds):
        down, up = adapters[turn % len(adapters)]
        device_rows.write(fold.inputs["down"], down)
        device_rows.write(fold.inputs["up"], up)
        fold()
        found = error(main.answer(), expected[turn % len(adapters)])
        worst, wrong = max(worst, found), wrong + (found > 1e-4)
    report.figures |= {"worst error": worst, "switches": float(rounds)}
    report.claim("answers after a switch that are not the new weights'", wrong, 0, at_least=False)
    report.milliseconds(interleaved({"fold 8 weights 512 x 512": fold, "run 64 rows": main}, place.seconds))
    return report


def _products(x: Array, base: dict[str, Array], change: Array) -> Array:
    y = x.astype(np.float64)
    for weight in base.values():
        y = y @ (weight.astype(np.float64) + change)
    return y


def native_adapter(place: Place) -> Report:
    """(c) What ONNX Runtime's own adapters cost a run, which copies them to the device each time."""
    report, bundle = Report(), Bundle.open(place.path / "encoder")
    session = place.open(bundle.path / "factored.onnx")
    file = next((bundle.path / "adapters" / "one").glob("*/adapter.onnx_adapter"))
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(file))
    options.add_active_adapter(adapter)
    inputs = tokens(1)
    bound = Fixed(place, session, {**inputs, **bundle.factors("one")})
    with_adapter = session.run(None, inputs, options)[0]
    report.figures["error against bound factors"] = error(with_adapter, bound.answer())
    calls: dict[str, Callable[[], object]] = {
        "base, numpy": lambda: session.run(None, inputs),
        "native adapter, numpy": lambda: session.run(None, inputs, options),
        "factors fed, numpy": lambda: session.run(None, {**inputs, **factors}),
        "factors bound on the device": bound,
    }
    factors = bundle.factors("one")
    report.milliseconds(interleaved(calls, place.seconds))
    return report


def fed_convs(place: Place) -> Report:
    """(d) What a conv costs whose weight is fed, in both layouts."""
    report = Report()
    x = normal(8, 64, 32, 32, scale=0.1)
    weights = {f"w{i}": np.full((64, 64, 3, 3), 0.01, np.float32) for i in range(6)}
    calls: dict[str, Fixed] = {}
    for layout in ("NCHW", "NHWC") if place.cuda else ("NCHW",):
        for form, fed in (("constant", {}), ("fed", weights)):
            extra = {"prefer_nhwc": "1"} if layout == "NHWC" else {}
            session = _session(place, place.graph(f"conv_{form}"), extra)
            calls[f"{form}, {layout}"] = Fixed(place, session, {"x": x, **fed})
    answers = {name: call.answer() for name, call in calls.items()}
    report.figures["worst error"] = max(error(answer, answers["constant, NCHW"]) for answer in answers.values())
    times = interleaved(calls, place.seconds)
    report.milliseconds(times)
    for layout in {name.partition(", ")[2] for name in times}:
        report.figures[f"fed / constant, {layout}"] = times[f"fed, {layout}"] / times[f"constant, {layout}"]
    return report


def _session(place: Place, model: Path, extra: dict[str, str]) -> onnxruntime.InferenceSession:
    if not extra:
        return place.open(model)
    provider = ("CUDAExecutionProvider", Cuda().options() | extra)
    session = onnxruntime.InferenceSession(str(model), providers=[provider, "CPUExecutionProvider"])
    assert session.get_providers()[0] == provider[0]
    return session


def copies(place: Place) -> Report:
    """(e) The ways from tensor to tensor on the device."""
    place.need_cuda()
    report, array = Report(), normal(1024, 1024)
    source, target = place.on_device(array), place.on_device(np.zeros_like(array))
    ways: dict[str, Callable[[], object]] = {
        "copy_tensors": lambda: onnxruntime.copy_tensors([source], [target]),
        "update_inplace of a value": lambda: target.update_inplace(source),
        "update_inplace of an array": lambda: target.update_inplace(array),
    }
    works: dict[str, Callable[[], object]] = {}
    for name, way in ways.items():
        device_rows.write(target, np.zeros_like(array))
        try:
            way()
        except Exception as found:  # a way that fails is an answer
            report.figures[name] = f"{type(found).__name__}: {str(found).splitlines()[0][:120]}"
            continue
        report.claim(f"{name} copies", float(np.array_equal(target.numpy(), array)), 1, at_least=True)
        works[f"{name}, 4 MiB"] = way
    report.milliseconds(interleaved(works, place.seconds))
    return report


def shared_weights(place: Place) -> Report:
    """(f) Do sessions that are given weights on the device share them?"""
    place.need_cuda()
    report, bundle = Report(), Bundle.open(place.path / "encoder")
    model = bundle.path / "base.onnx"
    names = [name for name, own in onnx_bytes.declared(model.read_bytes()).items() if own.external]
    arrays = {name: bundle.base_value(name) for name in names if name in bundle.manifest.weights}
    report.figures["weights, MiB"] = sum(array.nbytes for array in arrays.values()) / 2**20
    expected = place.open(model).run(None, tokens(2))[0]
    for how in ("none", "add_initializer", "add_external_initializers"):
        values = {name: place.on_device(array) for name, array in arrays.items()} if how != "none" else {}
        before, sessions = device_bytes(), []
        for _ in range(4):
            options = onnxruntime.SessionOptions()
            try:
                if how == "add_external_initializers":
                    options.add_external_initializers(list(values), list(values.values()))
                elif how == "add_initializer":
                    for name, value in values.items():
                        options.add_initializer(name, value)
                sessions.append(open_session(model, place.choice, options=options))
            except Exception as refusal:  # an answer too
                report.figures[how] = f"{type(refusal).__name__}: {str(refusal).splitlines()[0][:160]}"
                break
        if len(sessions) < 4:
            continue
        report.figures[f"{how}: MiB a session"] = (device_bytes() - before) / 4 / 2**20
        found = max(error(session.run(None, tokens(2))[0], expected) for session in sessions)
        report.claim(f"{how} answers as the base", found, 1e-5, at_least=False)
    return report


def launches(place: Place) -> Report:
    """(g) Three products for a branch, two, or down-products of q, k and v packed: with graphs and without."""
    report = Report()
    x, width, rank, layers = normal(8, 384, scale=0.1), 384, 8, 12
    feeds: dict[str, dict[str, Array]] = {form: {"x": x} for form in ("base", "two", "three", "packed")}
    for i in range(layers):
        downs = {p: normal(width, rank, seed=100 * i + n, scale=0.05) for n, p in enumerate("qkv")}
        feeds["packed"][f"d{i}"] = np.concatenate(list(downs.values()), axis=1)
        for p, down in downs.items():
            weight, up = normal(width, width, seed=i, scale=0.03), normal(rank, width, seed=i, scale=0.05)
            for form, fed in feeds.items():
                fed[f"w{i}{p}"] = weight
                if form != "base":
                    fed[f"u{i}{p}"] = up
                if form in ("two", "three"):
                    fed[f"d{i}{p}"] = down
            feeds["three"][f"c{i}{p}"] = np.eye(rank, dtype=np.float32)
    for way, graphs in place.ways.items():
        calls = {form: Fixed(place, place.graph(f"launch_{form}"), fed, graphs=graphs) for form, fed in feeds.items()}
        two = calls["two"].answer()
        for form in ("three", "packed"):
            found = error(calls[form].answer(), two)
            report.claim(f"{form} answers as two, {way}: error", found, 1e-5, at_least=False)
        times = interleaved(calls, place.seconds)
        report.milliseconds({f"{form}, {way}": own for form, own in times.items()})
        report.figures |= {f"{form} / base, {way}": times[form] / times["base"] for form in ("two", "three", "packed")}
    return report


def exact_convs(place: Place) -> Report:
    """(h) Do convolutions compute in float32, where TF32 is forbidden to the session alone or to the whole process?"""
    report = Report()
    setting = os.environ.get("NVIDIA_TF32_OVERRIDE", "unset")
    for name, rank in (("3 x 3", 64), ("1 x 1", 256)):
        size = int(name[0])
        x, w = normal(4, rank, 32, 32), normal(rank, rank, size, size, seed=1, scale=0.05)
        pad = size // 2
        padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
        expected = np.einsum("nihwkl,oikl->nohw", windows, w.astype(np.float64), optimize=True)
        got = Fixed(place, place.graph(f"conv_{size}"), {"x": x, "w": w}).answer()
        report.claim(f"conv {name}, NVIDIA_TF32_OVERRIDE {setting}: error", error(got, expected), 1e-5, at_least=False)
    return report


def tokens(rows: int, length: int = 64, seed: int = 0) -> dict[str, Array]:
    """A batch for the encoder."""
    ids = np.random.default_rng(seed).integers(0, 500, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
