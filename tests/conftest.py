from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from onnxscript._framework_apis import torch_2_11

from tests import nets
from tpeft_deploy import Adapter, Bundle, export_bundle


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _torch_operators_are_read_once() -> Iterator[None]:
    # Each export parses the source of some 500 of onnxscript's functions anew: a third of the time of a small one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_2_11, "get_torchlib_ops", functools.cache(torch_2_11.get_torchlib_ops))
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


@pytest.fixture
def own_bundle(conv_bundle: Bundle, tmp_path: Path) -> Bundle:
    path = tmp_path / "conv"
    shutil.copytree(conv_bundle.path, path)
    return Bundle.open(path)
