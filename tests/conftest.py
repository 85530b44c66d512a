from __future__ import annotations

import functools
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from onnxscript._framework_apis import torch_2_11
from torch._export import utils
from torch.export import decomp_utils, exported_program
from torch.onnx._internal.exporter._registration import ONNXRegistry

from tests.helpers import nets, two_towers
from tpeft_deploy import Adapter, Bundle, export_bundle
from tpeft_deploy.cli import progress_display

# Both of what is left out depend on how busy the machine is.
settings.register_profile("tests", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_collection_finish() -> None:
    # A full collection goes through torch, its operators and all tests; exports cause many: a seventh of their time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Whatever ran before, a test and the fixtures made for it draw the same numbers from torch."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _torch_operators_are_read_once() -> Iterator[None]:
    # Each export parses the source of some 500 of onnxscript's functions anew, takes their signatures, and asks for all
    # operators that torch can decompose: three quarters of the time of a small one.
    registry: Any = ONNXRegistry
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_2_11, "get_torchlib_ops", functools.cache(torch_2_11.get_torchlib_ops))
        patch.setattr(registry, "from_torchlib", staticmethod(functools.cache(registry.from_torchlib)))
        for module in (exported_program, decomp_utils):
            patch.setattr(module, "_collect_all_valid_cia_ops", functools.cache(utils._collect_all_valid_cia_ops))
        yield


@pytest.fixture(autouse=True, scope="session")
def _commands_are_short() -> Iterator[None]:
    # Where stderr is no terminal, commands that take longer show lines of progress: no test depends on how long.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress_display, "_SHORT", 1e6)
        yield


@pytest.fixture(autouse=True, scope="session")
def _nothing_waits_for_the_disk() -> Iterator[None]:
    # Tests kill processes, never the machine; an export has 58 of these, of milliseconds each beside other writers.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _file: None)
        yield


@pytest.fixture(scope="session")
def conv_adapters() -> dict[str, Adapter]:
    return nets.conv_adapters(nets.conv_net()[0])


@pytest.fixture(scope="session")
def conv_bundle(tmp_path_factory: pytest.TempPathFactory, conv_adapters: dict[str, Adapter]) -> Bundle:
    """A bundle of ConvNet that tests read; `own_bundle` is for those that write."""
    module, inputs = nets.conv_net()
    path = tmp_path_factory.mktemp("bundles") / "conv"
    return export_bundle(module, conv_adapters, path, example_inputs=inputs, folded=True)


@pytest.fixture(scope="session")
def towers_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of two components, which tests read."""
    return two_towers.bundle(tmp_path_factory.mktemp("bundles") / "towers")


@pytest.fixture
def own_bundle(conv_bundle: Bundle, tmp_path: Path) -> Bundle:
    path = tmp_path / "conv"
    shutil.copytree(conv_bundle.path, path)
    return Bundle.open(path)
