"""A runtime of a bundle with several components: one row of a task in all of them."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.helpers import two_towers
from tests.helpers.waiting import SECONDS
from tpeft_deploy import Adapter, Bundle, Runtime
from tpeft_deploy.cli import main
from tpeft_deploy.errors import CapacityError, InputError, IntegrityError, UnknownTarget
from tpeft_deploy.runtime.batching.policy import FirstCome
from tpeft_deploy.tucker import Array

ADAPTERS = two_towers.adapters()
MIXED = ["both", "heads", "base", "reading", "seeing", "both"]
COMPONENTS = list(two_towers.SIZES)


@pytest.fixture(scope="module")
def runtime(towers_bundle: Bundle) -> Runtime:
    return Runtime(towers_bundle.path, provider="cpu", threads=1)


def close(found: Array, component: str, adapter: Adapter | None, given: dict[str, Array], row: int) -> None:
    np.testing.assert_allclose(found, two_towers.expected(component, adapter, given)[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("component", COMPONENTS)
def test_mixed_rows_of_each_component(runtime: Runtime, component: str) -> None:
    given = two_towers.inputs(component, len(MIXED))
    found = runtime.run(given, tasks=MIXED, component=component)["scores"]
    joined = asyncio.run(runtime.infer(given, tasks=MIXED, component=component))["scores"]
    for row, task in enumerate(MIXED):
        close(found[row], component, ADAPTERS.get(task), given, row)
        np.testing.assert_allclose(joined[row], found[row], rtol=1e-5, atol=1e-6)


def test_a_task_has_one_row_number(runtime: Runtime) -> None:
    versions = [runtime._versions.find(task) for task in runtime.tasks]
    with runtime._residency.acquire(versions) as held:
        bank, rows = held.rows()
        assert len(set(rows)) == len(rows) == len(ADAPTERS)
        assert {own: part.rows for own, part in bank.parts.items()} == dict.fromkeys(COMPONENTS, bank.rows)
        assert sum(part.nbytes for part in bank.parts.values()) == bank.nbytes
        for own, part in bank.parts.items():
            assert all(value is bank.values[f"{own}/{name}"] for name, value in part.values.items())


def test_a_weighted_set_is_summed_in_each_component(runtime: Runtime) -> None:
    strengths = {"seeing": 0.5, "reading": 2.0}
    for component, task in (("image", "seeing"), ("text", "reading")):
        given = two_towers.inputs(component, 1)
        found = runtime.run(given, strengths, component=component)["scores"]
        delta = next(iter(ADAPTERS[task].deltas.items()))
        scaled = Adapter({delta[0]: replace(delta[1], scale=delta[1].scale * strengths[task])})
        close(found[0], component, scaled, given, 0)


@pytest.mark.parametrize("component", [None, "audio"])
def test_the_component_has_to_be_named(runtime: Runtime, component: str | None) -> None:
    with pytest.raises(InputError, match="one of 'image', 'text', got " + ("none" if component is None else "'audio'")):
        runtime.run(two_towers.inputs("text", 1), component=component)


def test_one_graph_is_the_component_model(conv_bundle: Bundle) -> None:
    with Runtime(conv_bundle.path, provider="cpu", threads=1) as runtime:
        given = {"pixels": np.ones((1, 1, 12, 14), np.float32)}
        assert runtime.components == ["model"]
        named = runtime.run(given, "plain", component="model")
        np.testing.assert_array_equal(named["logits"], runtime.run(given, "plain")["logits"])


def test_counters_of_one_component_and_of_all(towers_bundle: Bundle) -> None:
    with Runtime(towers_bundle.path, provider="cpu", threads=1, preload=False) as runtime:
        for component, rows in (("image", 3), ("text", 2)):
            asyncio.run(runtime.infer(two_towers.inputs(component, rows), "both", component=component))
        assert (runtime.batching("image").rows, runtime.batching("text").rows, runtime.batching().rows) == (3, 2, 5)
        assert runtime.batching().joined == {1: 2}


def test_eviction_takes_a_task_from_all_components(towers_bundle: Bundle) -> None:
    def asked(runtime: Runtime, task: str) -> None:
        for component in COMPONENTS:
            given = two_towers.inputs(component, 1)
            close(runtime.run(given, task, component=component)["scores"][0], component, ADAPTERS[task], given, 0)

    with Runtime(towers_bundle.path, provider="cpu", threads=1, preload=False) as probe:
        probe.prefetch(list(ADAPTERS)).result(SECONDS)
        row = probe._residency._bank.row_bytes
    with Runtime(towers_bundle.path, provider="cpu", threads=1, preload=False, device_bytes=3 * row) as runtime:
        for task in ["both", "heads", "both", "seeing", "heads", "reading", "both"]:
            asked(runtime, task)
            assert runtime.usage()["device_bytes"] <= 3 * row
        assert "disk" in runtime.residency().values()
    with (
        Runtime(towers_bundle.path, provider="cpu", threads=1, preload=False, device_bytes=row) as small,
        pytest.raises(CapacityError, match="room for it"),
    ):
        asked(small, "both")


def test_a_task_replaced_while_requests_run(towers_bundle: Bundle) -> None:
    """Each answer is the old one or the new one, and once `load` has returned, it is the new one in all components."""
    negative = {name: replace(delta, scale=-delta.scale) for name, delta in ADAPTERS["both"].deltas.items()}
    versions = [ADAPTERS["both"], replace(ADAPTERS["both"], deltas=negative)]
    given = {component: two_towers.inputs(component, 1) for component in COMPONENTS}
    answers = {
        component: [two_towers.expected(component, adapter, given[component]) for adapter in versions]
        for component in COMPONENTS
    }

    def which(runtime: Runtime, component: str) -> int:
        found = runtime.run(given[component], "both", component=component)["scores"]
        return int(np.argmin([np.abs(found - answer).max() for answer in answers[component]]))

    with Runtime(towers_bundle.path, provider="cpu", threads=1) as runtime:
        wrong: list[Any] = []
        over = threading.Event()

        def ask(component: str) -> None:
            while not over.is_set():
                found = runtime.run(given[component], "both", component=component)["scores"]
                if min(np.abs(found - answer).max() for answer in answers[component]) > 1e-4:
                    wrong.append((component, found))

        threads = [threading.Thread(target=ask, args=[component], daemon=True) for component in COMPONENTS]
        for thread in threads:
            thread.start()
        try:
            for turn in range(1, 9):
                runtime.load("both", versions[turn % 2])
                assert [which(runtime, component) for component in COMPONENTS] == [turn % 2] * len(COMPONENTS)
        finally:
            over.set()
            for thread in threads:
                thread.join(SECONDS)
        assert not wrong


def test_what_no_component_takes_is_refused_by_name(runtime: Runtime) -> None:
    strange = replace(ADAPTERS["seeing"], deltas={"nowhere.weight": ADAPTERS["seeing"].deltas["image.weight"]})
    with pytest.raises(UnknownTarget, match=r"'nowhere.weight'.*components image, text"):
        runtime.load("strange", replace(strange, base_digests={}))
    assert "strange" not in runtime.tasks


def test_folds_are_made_where_a_task_changes_something(towers_bundle: Bundle) -> None:
    with Runtime(towers_bundle.path, provider="cpu", threads=1) as runtime:
        runtime.pin("both", folded=True)
        runtime.pin("seeing", folded=True)
        assert {task for task, tier in runtime.residency().items() if tier == "folded"} == {"both", "seeing"}
        for component, tasks in (("image", {"both", "seeing"}), ("text", {"both"})):
            folds = runtime._components[component].folds
            assert {task for task in ADAPTERS if folds.has(runtime._versions.find(task))} == tasks
            for task in ("both", "seeing"):
                given = two_towers.inputs(component, 2)
                found = runtime.run(given, task, component=component)["scores"]
                close(found[1], component, ADAPTERS[task], given, 1)
        assert runtime.usage()["folded_bytes"] > 0
        runtime.unpin("both")
        assert runtime.residency(["both"]) == {"both": "device"}


def test_a_probe_looks_at_all_components(runtime: Runtime) -> None:
    zero = {name: replace(delta, scale=0.0) for name, delta in ADAPTERS["both"].deltas.items()}
    runtime.load("nothing", replace(ADAPTERS["both"], deltas=zero))
    runtime.load("little", replace(ADAPTERS["both"], deltas={**zero, **ADAPTERS["reading"].deltas}))
    try:
        assert [runtime.probe(task) for task in ("both", "seeing", "nothing", "little")] == [True, True, False, True]
    finally:
        runtime.forget(["nothing", "little"])


def test_each_queue_has_an_order(towers_bundle: Bundle) -> None:
    made: dict[str, FirstCome[Any]] = {}
    order: Callable[[str], FirstCome[Any]] = lambda component: made.setdefault(component, FirstCome())  # noqa: E731
    with Runtime(towers_bundle.path, provider="cpu", threads=1, order=order, preload=False) as runtime:
        asyncio.run(runtime.infer(two_towers.inputs("text", 1), component="text"))
    assert list(made) == COMPONENTS
    with pytest.raises(InputError, match="order as a function"):
        Runtime(towers_bundle.path, provider="cpu", threads=1, order=FirstCome())


def test_without_a_copy(towers_bundle: Bundle) -> None:
    with Runtime(towers_bundle.path, provider="cpu", threads=1, own_copy=False, preload=False) as runtime:
        given = two_towers.inputs("text", 1)
        close(runtime.run(given, "both", component="text")["scores"][0], "text", ADAPTERS["both"], given, 0)


def test_an_altered_component_is_refused(towers_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "towers"
    shutil.copytree(towers_bundle.path, path)
    weights = path / "components" / "text" / "weights.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(IntegrityError, match=r"weights\.data"):
        Runtime(path, provider="cpu", threads=1)


def test_the_command_line_names_the_component(towers_bundle: Bundle, tmp_path: Path) -> None:
    given = two_towers.inputs("text", 2)
    np.savez(tmp_path / "in.npz", **given)  # type: ignore[arg-type]
    place = [str(towers_bundle.path), "--input", str(tmp_path / "in.npz"), "--output", str(tmp_path / "out.npz")]
    found = CliRunner().invoke(main, ["run", *place, "--task", "both", "--component", "text", "--provider", "cpu"])
    assert found.exit_code == 0, found.output
    close(np.load(tmp_path / "out.npz")["scores"][1], "text", ADAPTERS["both"], given, 1)
