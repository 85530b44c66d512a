from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import nets
from tpeft_deploy import Adapter, Bundle, export_bundle


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
