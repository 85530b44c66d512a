"""Runs with fixed shapes and addresses give the answers of ordinary runs; recording needs CUDA (test_cuda.py)."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.helpers import nets
from tests.helpers.exporters import architectures
from tests.helpers.runtime.banks import all_tasks
from tpeft_deploy import Bundle, export_bundle
from tpeft_deploy.errors import RunError
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.runtime.adapters import device_rows
from tpeft_deploy.runtime.adapters.bank import Bank
from tpeft_deploy.runtime.sessions import providers
from tpeft_deploy.runtime.sessions.banked import Session
from tpeft_deploy.runtime.sessions.cuda_graph import Captured, Policy
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.providers import ORT_ERRORS, Choice, Cuda
from tpeft_deploy.runtime.sessions.shape_buckets import Buckets
from tpeft_deploy.tucker import Array

CPU = Choice("cpu", "a test")
CUDA = Choice("cuda", "a test pretends")
MODULE = "tpeft_deploy.runtime.sessions.cuda_graph"
OPEN_SESSION = "tpeft_deploy.runtime.sessions.factory.open_session"


def images(rows: int, seed: int = 0) -> dict[str, Array]:
    return {"pixels": np.random.default_rng(seed).standard_normal((rows, 1, 12, 14)).astype(np.float32)}


def tokens(rows: int, length: int, seed: int = 0) -> dict[str, Array]:
    ids = np.random.default_rng(seed).integers(0, 50, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def same(got: dict[str, Array], expected: dict[str, Array]) -> None:
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert got[name].shape == array.shape
        assert got[name].flags.owndata
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def conv(conv_bundle: Bundle) -> tuple[Bank, Session]:
    return all_tasks(conv_bundle)[0], Session(conv_bundle.path / "banked.onnx", SessionFactory(CPU, threads=1))


@pytest.fixture(scope="module")
def bert_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    module, inputs, shapes = architectures.bert()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    adapters = {task: nets.adapter_for(module, {name: (2, 2)}, seed=seed) for seed, task in enumerate("ab")}
    path = tmp_path_factory.mktemp("bundles") / "bert"
    pads = dict.fromkeys(inputs, 0)
    return export_bundle(module, adapters, path, example_inputs=inputs, dynamic_shapes=shapes, padding=pads)


@pytest.fixture
def runs(conv_bundle: Bundle) -> Iterator[Captured]:
    runs = open_captured(conv_bundle)
    yield runs
    runs.close()


def open_captured(bundle: Bundle, buckets: Buckets | None = None, policy: Policy | None = None) -> Captured:
    return Captured(
        bundle.path / "banked.onnx", SessionFactory(CPU, threads=1), bundle.manifest, buckets=buckets, policy=policy
    )


def test_closing_twice_is_closing_once(conv_bundle: Bundle) -> None:
    runs = open_captured(conv_bundle)
    runs.close()
    runs.close()


def test_every_number_of_rows_and_every_time_of_asking(runs: Captured, conv: tuple[Bank, Session]) -> None:
    bank, session = conv
    for time in range(4):  # as it is, with buffers, and again
        for rows in (1, 2, 3, 5, 8):
            inputs = images(rows, seed=time)
            for index in (np.array([3]), np.arange(rows) % bank.rows):
                same(runs.run(bank, inputs, index), session.run(bank, inputs, index))


def test_lengths_are_filled_up_and_cut_back(bert_bundle: Bundle) -> None:
    bank, rows = all_tasks(bert_bundle)
    session = Session(bert_bundle.path / "banked.onnx", SessionFactory(CPU, threads=1))
    runs = open_captured(bert_bundle, Buckets(bert_bundle.manifest, max_rows=4, lengths=[8, 16]))
    for time in range(3):
        for count, length in ((1, 3), (3, 8), (3, 11), (2, 16), (5, 18)):
            inputs = tokens(count, length, seed=time)
            index = np.array([rows["a"], rows["b"], 0, rows["b"], rows["a"]][:count])
            same(runs.run(bank, inputs, index), session.run(bank, inputs, index))
    runs.close()


def test_a_row_that_is_written_is_seen_by_the_next_run(conv_bundle: Bundle, runs: Captured) -> None:
    bank, rows = all_tasks(conv_bundle)
    before = [runs.run(bank, images(2), np.array([rows["plain"]])) for _ in range(3)][-1]
    wide = runs.run(bank, images(2), np.array([rows["wide"]]))
    own = {name: value.numpy()[rows["wide"]].copy() for name, value in bank.values.items()}
    bank.write(rows["plain"], own)
    after = runs.run(bank, images(2), np.array([rows["plain"]]))
    same(after, wide)
    assert not np.allclose(after["logits"], before["logits"])


def test_another_bank_takes_over_and_runs_on_the_old_one_finish_on_it(
    conv_bundle: Bundle, runs: Captured, conv: tuple[Bank, Session]
) -> None:
    bank, session = conv
    index = np.array([1, 4, 0])
    larger = Bank.allocate(bank.layout, bank.shapes, 9, "cpu", old=bank, moves={1: 7, 4: 8})
    for _ in range(3):
        same(runs.run(bank, images(3), index), session.run(bank, images(3), index))
    for _ in range(3):
        same(runs.run(larger, images(3), np.array([7, 8, 0])), session.run(bank, images(3), index))
        same(runs.run(bank, images(3), index), session.run(bank, images(3), index))
    assert runs._bank is larger


def test_a_bank_that_was_replaced_is_let_go(conv_bundle: Bundle, runs: Captured) -> None:
    old, _ = all_tasks(conv_bundle)
    gone = weakref.ref(old)
    for _ in range(3):
        runs.run(old, images(2), np.array([1]))
    new, _ = all_tasks(conv_bundle)
    runs.run(new, images(2), np.array([1]))
    del old
    gc.collect()
    assert gone() is None


def test_answers_are_not_written_by_later_runs(runs: Captured, conv: tuple[Bank, Session]) -> None:
    answers = [runs.run(conv[0], images(2, seed), np.array([1, 2])) for seed in range(6)]
    for seed, answer in enumerate(answers):
        same(answer, conv[1].run(conv[0], images(2, seed), np.array([1, 2])))


def test_threads_get_their_own_answers(runs: Captured, conv: tuple[Bank, Session]) -> None:
    bank, session = conv
    wrong: list[int] = []

    def caller(seed: int) -> None:
        for time in range(40):
            inputs, index = images(1 + (seed + time) % 4, seed), np.array([(seed + time) % bank.rows])
            expected = session.run(bank, inputs, index)["logits"]
            if not np.allclose(runs.run(bank, inputs, index)["logits"], expected, rtol=1e-4, atol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_shapes_that_were_not_used_lately_are_let_go(conv_bundle: Bundle, conv: tuple[Bank, Session]) -> None:
    bank, session = conv
    runs = open_captured(conv_bundle, policy=Policy(buckets=2))
    for rows in (1, 2, 4, 8, 1, 2, 4, 8, 1, 1, 1):
        same(runs.run(bank, images(rows), np.array([2])), session.run(bank, images(rows), np.array([2])))
        assert len(runs._shapes) <= 2
    runs.close()


def test_a_run_that_was_stopped_before_it_began(runs: Captured, conv: tuple[Bank, Session]) -> None:
    bank, session = conv
    stopped = onnxruntime.RunOptions()
    stopped.terminate = True
    for _ in range(3):
        with pytest.raises(RuntimeError, match="terminate"):
            runs.run(bank, images(2), np.array([1]), stopped)
        index = np.array([1])
        same(runs.run(bank, images(2), index, onnxruntime.RunOptions()), session.run(bank, images(2), index))


def test_the_nodes_that_no_graph_can_hold_are_named(conv_bundle: Bundle, bert_bundle: Bundle) -> None:
    options = Cuda(graphs=True)
    found = providers.control_flow(providers.open_session(conv_bundle.path / "banked.onnx", CPU, cuda=options))
    assert [node.split()[0] for node in found] == ["Scan", "Scan"]
    assert all("GroupedConv" in node for node in found)
    assert not providers.control_flow(providers.open_session(bert_bundle.path / "banked.onnx", CPU, cuda=options))


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, *, failures: int = 0) -> list[str]:
    """Sessions and tensors on the CPU in place of CUDA's; the graph ids that runs asked for.

    The first recordings fail, as many as told.
    """
    left = [failures]
    real_open, real_allocate = providers.open_session, device_rows.allocate_as
    ids: list[str] = []

    class Recorded:
        def __init__(self, session: onnxruntime.InferenceSession) -> None:
            self._session = session

        def __getattr__(self, name: str) -> object:
            return getattr(self._session, name)

        def run_with_iobinding(
            self, binding: onnxruntime.IOBinding, options: onnxruntime.RunOptions | None = None
        ) -> None:
            assert options is not None
            ids.append(options.get_run_config_entry("gpu_graph_id"))
            if left[0] and ids[-1] != "-1":
                left[0] -= 1
                raise RuntimeError("a capture was spoilt")
            self._session.run_with_iobinding(binding, options)

    def open_session(model: Path, choice: Choice, **rest: Any) -> object:
        return Recorded(real_open(model, CPU)) if choice is CUDA else real_open(model, choice, **rest)

    monkeypatch.setattr(OPEN_SESSION, open_session)
    monkeypatch.setattr(
        f"{MODULE}.device_rows.allocate_as", lambda shape, kind, device: real_allocate(shape, kind, "cpu")
    )
    monkeypatch.setattr(f"{MODULE}.control_flow", lambda session: [])
    monkeypatch.setattr(onnxruntime.IOBinding, "bind_output", _on_cpu(onnxruntime.IOBinding.bind_output))
    return ids


def test_each_shape_and_bank_has_a_graph_of_its_own(bert_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = pretend_cuda(monkeypatch)
    runs = Captured(
        bert_bundle.path / "banked.onnx", SessionFactory(CUDA, threads=1), bert_bundle.manifest, policy=Policy(graphs=3)
    )
    bank, _ = all_tasks(bert_bundle)
    other, _ = all_tasks(bert_bundle)

    def asked(bank: Bank, rows: int, times: int) -> list[str]:
        ids.clear()
        for _ in range(times):
            runs.run(bank, tokens(rows, 4), np.array([1]))
        return ids[:]

    assert asked(bank, 1, 4) == ["-1", "1", "1", "1"]
    assert asked(bank, 2, 3) == ["-1", "2", "2"]
    assert asked(bank, 1, 1) == ["1"]
    assert asked(other, 1, 3) == ["-1", "3", "-1"]  # three graphs: the session is opened afresh
    assert asked(bank, 1, 2) == ["-1", "-1"]  # it has been replaced
    assert asked(other, 1, 2) == ["4", "4"]
    runs.close()


def _on_cpu(real: object) -> object:
    return lambda binding, name, device="cpu", number=0: real(binding, name, "cpu")  # type: ignore[operator]


def ask(runs: Captured, bundle: Bundle, bank: Bank, times: int, rows: int = 1) -> None:
    """Several times the same; each answer is that of an ordinary session."""
    session, (same_rows, _) = Session(bundle.path / "banked.onnx", SessionFactory(CPU, threads=1)), all_tasks(bundle)
    expected = session.run(same_rows, tokens(rows, 4), np.array([1]))
    for _ in range(times):
        got = runs.run(bank, tokens(rows, 4), np.array([1]))
        np.testing.assert_allclose(got["logits"], expected["logits"], rtol=1e-5, atol=1e-6)


def test_a_request_is_answered_although_the_recording_fails(
    bert_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ids = pretend_cuda(monkeypatch, failures=2)
    runs = Captured(bert_bundle.path / "banked.onnx", SessionFactory(CUDA, threads=1), bert_bundle.manifest)
    bank, _ = all_tasks(bert_bundle)
    sessions = {id(runs._session): runs._session}
    ask(runs, bert_bundle, bank, 2)
    sessions[id(runs._session)] = runs._session
    assert len(sessions) == 2  # nothing says what state a failed recording leaves
    ask(runs, bert_bundle, bank, 3)
    assert ids == ["-1", "1", "-1", "2", "-1", "3", "3"]
    assert [record.getMessage() for record in caplog.records] == [
        "record banked.onnx as a CUDA graph: a capture was spoilt; answered by a plain run"
    ]
    assert runs.recordings == 1
    runs.close()


def test_recordings_that_fail_again_and_again_are_given_up(
    bert_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ids = pretend_cuda(monkeypatch, failures=100)
    runs = Captured(bert_bundle.path / "banked.onnx", SessionFactory(CUDA, threads=1), bert_bundle.manifest)
    bank, _ = all_tasks(bert_bundle)
    ask(runs, bert_bundle, bank, 8)
    ask(runs, bert_bundle, bank, 4, rows=2)
    assert [graph for graph in ids if graph != "-1"] == ["1", "2", "3"]
    assert caplog.records[-1].getMessage() == "banked.onnx is not recorded any more: 3 recordings in a row failed"
    assert len(caplog.records) == 2
    runs.close()


def test_a_shape_that_cannot_be_recorded_keeps_no_other_from_it(
    bert_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = pretend_cuda(monkeypatch, failures=2)
    policy = Policy(failures=2)
    runs = Captured(
        bert_bundle.path / "banked.onnx", SessionFactory(CUDA, threads=1), bert_bundle.manifest, policy=policy
    )
    bank, _ = all_tasks(bert_bundle)
    ask(runs, bert_bundle, bank, 2)
    runs._failures = 0  # as after another shape's recording
    ask(runs, bert_bundle, bank, 1)
    runs._failures = 0
    ask(runs, bert_bundle, bank, 3)
    assert ids == ["-1", "1", "-1", "2", "-1", "-1", "-1", "-1"]
    ids.clear()
    ask(runs, bert_bundle, bank, 3, rows=2)
    assert ids == ["-1", "3", "3"]
    runs.close()


def test_a_session_that_opens_puts_a_recording_off(bert_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = pretend_cuda(monkeypatch)
    runs = Captured(bert_bundle.path / "banked.onnx", SessionFactory(CUDA, threads=1), bert_bundle.manifest)
    bank, _ = all_tasks(bert_bundle)
    with device_lock.opening("cuda"):
        ask(runs, bert_bundle, bank, 3)
    ask(runs, bert_bundle, bank, 2)
    assert [graph for graph in ids if graph != "-1"] == ["1", "1"]
    assert ids[:3] == ["-1"] * 3
    runs.close()


@pytest.mark.parametrize("row", [-1, 5, 2**40])
def test_rows_that_a_bank_does_not_have(
    conv_bundle: Bundle, runs: Captured, conv: tuple[Bank, Session], row: int
) -> None:
    bank, session = conv
    for run in (session.run, runs.run):
        with pytest.raises(RunError, match=rf"expected bank rows 0\.\.{bank.rows - 1}, got {row}"):
            run(bank, images(2), np.array([0, row]))
        with pytest.raises(RunError, match="bank rows"):
            run(bank, images(2), np.array([row]))


def test_a_model_with_control_flow_is_refused_by_name(conv_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real = providers.open_session
    monkeypatch.setattr(OPEN_SESSION, lambda model, choice, **rest: real(model, CPU, **rest))
    with pytest.raises(RunError, match=r"without If, Loop and Scan.*got Scan \w+GroupedConv.*, Scan .*Serve it"):
        Captured(
            conv_bundle.path / "banked.onnx", SessionFactory(Choice("cuda", "a test pretends")), conv_bundle.manifest
        )


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("conv_bundle", r"got Scan \w+GroupedConv.*grouped convs"),
        ("bert_bundle", r"got This session cannot use.*, with nodes on the CPU \(\w+, .*\)\. Serve it"),
    ],
)
def test_a_session_that_refuses_graphs_names_the_nodes_too(
    name: str, told: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = request.getfixturevalue(name)
    real = providers.open_session

    def refusing(model: Path, choice: Choice, *, cuda: Cuda, **rest: object) -> onnxruntime.InferenceSession:
        if cuda.graphs:
            raise ORT_ERRORS[0]("This session cannot use the graph capture feature")
        return real(model, CPU, cuda=cuda, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(OPEN_SESSION, refusing)
    with pytest.raises(RunError, match=told):
        Captured(bundle.path / "banked.onnx", SessionFactory(CUDA), bundle.manifest)
