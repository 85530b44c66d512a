from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.exporters.small_decoders import made, trained
from tpeft_deploy import Adapter, Bundle, export_bundle, load_adapter

POSITIONS = 1024


@pytest.fixture(scope="session")
def llama_adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    model = made("llama", POSITIONS)
    paths = trained("llama", tmp_path_factory.mktemp("peft"), POSITIONS)
    return {task: load_adapter(path, base=model) for task, path in paths.items()}


@pytest.fixture(scope="session")
def llama_bundle(tmp_path_factory: pytest.TempPathFactory, llama_adapters: dict[str, Adapter]) -> Bundle:
    """A bundle of a small Llama in slot form; tests read it."""
    path: Path = tmp_path_factory.mktemp("bundles") / "llama"
    return export_bundle(made("llama", POSITIONS), llama_adapters, path, generation=True)
