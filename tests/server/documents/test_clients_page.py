"""docs/clients.md, run as it is printed: each client in a process of its own, as a reader would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from tests.helpers.server.client_peer import KEY, Peer, serving

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "clients.md").read_text()
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", PAGE, re.DOTALL)
SUM = [256.0, len("rotated")]
MIXED = [[256.0, len(task)] for task in ("rotated", "base", "mirrored")]
SHOW = """
import json
found = globals().get("logits"), globals().get("mixed")
logits, mixed = (x["logits"] if isinstance(x, dict) else x.as_numpy("logits") if hasattr(x, "as_numpy") else x
                 for x in found)
print(json.dumps([None if x is None else x.tolist() for x in (logits, mixed)]))
"""


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    own = Peer(bundle="digits")
    with serving(own):
        yield own


@pytest.fixture
def place(tmp_path: Path) -> Path:
    adapter = tmp_path / "adapters" / "sketches"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(save({"w": np.zeros(3, np.float32)}))
    return tmp_path


def blocks(language: str, word: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language and word in text]


def run(peer: Peer, place: Path, *command: str) -> str:
    environment = os.environ | {"TPEFT_KEY": KEY, "PYTHONPATH": str(ROOT), "NO_PROXY": "*"}
    done = subprocess.run(
        [text.replace("localhost:8080", peer.url.removeprefix("http://")) for text in command],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_block_of_the_page_is_known_here() -> None:
    words = [" Client(", "AsyncClient", "tritonclient.http", "tritonclient.grpc", "RESTClient", "GRPCClient"]
    kinds = [next(word for word in words if word in text) for kind, text in BLOCKS if kind == "python"]
    assert sorted(kinds) == sorted([*words, " Client("])
    assert len(blocks("sh", "curl")) == len(BLOCKS) - len(kinds) == 3


@pytest.mark.parametrize("word", ["from tpeft_deploy", "tritonclient.http", "InferenceRESTClient"])
def test_python_clients_get_what_the_page_says(peer: Peer, place: Path, word: str) -> None:
    # Not imported here: kserve and tritonclient.grpc cannot share a process.
    package = {"t": "tritonclient", "I": "kserve"}.get(word[0])
    if package is not None and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    found = [text for text in blocks("python", word) if "infer(" in text]
    assert found
    for text in found:
        logits, mixed = json.loads(run(peer, place, sys.executable, "-c", text + SHOW))
        assert logits == [SUM] * 3
        assert mixed == (None if "kserve" in text else MIXED)


def test_curl_gets_the_same(peer: Peer, place: Path) -> None:
    one, each, upload = blocks("sh", "curl")
    for text, wanted in [(one, [SUM] * 3), (each, MIXED)]:
        (output,) = json.loads(run(peer, place, "sh", "-ec", text))["outputs"]
        assert np.reshape(output["data"], output["shape"]).tolist() == wanted
    run(peer, place, "sh", "-ec", upload)
    assert set(peer.uploads[-1]) == {"config", "weights"}


def test_an_adapter_is_registered(peer: Peer, place: Path) -> None:
    (text,) = blocks("python", "client.register(")
    run(peer, place, sys.executable, "-c", text)
    assert peer.uploads[-1]["weights"] == (place / "adapters" / "sketches" / "adapter_model.safetensors").read_bytes()
