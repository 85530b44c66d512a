"""docs/clients.md, and the text quick start of README.md, run as printed: each client in another process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from tests.helpers import documents
from tests.helpers.server.client_peer import KEY, Peer, serving
from tests.helpers.server.live import Live, serving_bundle
from tpeft_deploy import Bundle, Client
from tpeft_deploy.errors import Unavailable
from tpeft_deploy.runtime.text.model_text import ModelText

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "clients.md").read_text()
README = (ROOT / "README.md").read_text()
BLOCKS = [(block.language, block.text) for block in documents.blocks(PAGE)]
SUM = [256.0, len("rotated")]
MIXED = [[256.0, len(task)] for task in ("rotated", "base", "mirrored")]
QUESTION = "Where is my parcel?"
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # else it asks a server on the internet
SHOW_TEXT = """
import json
print(json.dumps([text, pieces, globals().get("letters")]))
"""
SHOW_VECTORS = """
import json
print(json.dumps([list(map(float, row)) for row in vectors]))
"""
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


def run(peer: Peer | Live, place: Path, *command: str, key: str = KEY) -> str:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TPEFT_KEY": key, "PYTHONPATH": path, "NO_PROXY": "*", **QUIET}
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
    words += [" OpenAI(", "ChatOpenAI(", "litellm"]
    kinds = [next(word for word in words if word in text) for kind, text in BLOCKS if kind == "python"]
    assert sorted(kinds) == sorted([*words, *[" Client("] * 4, *[" OpenAI("] * 3])
    assert len(blocks("sh", "curl")) == len(BLOCKS) - len(kinds) == 4


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
    one, each, _, upload = blocks("sh", "curl")
    for text, wanted in [(one, [SUM] * 3), (each, MIXED)]:
        (output,) = json.loads(run(peer, place, "sh", "-ec", text))["outputs"]
        assert np.reshape(output["data"], output["shape"]).tolist() == wanted
    run(peer, place, "sh", "-ec", upload)
    assert set(peer.uploads[-1]) == {"config", "weights"}


def test_an_adapter_is_registered(peer: Peer, place: Path) -> None:
    text, _ = blocks("python", "client.register(")
    run(peer, place, sys.executable, "-c", text)
    assert peer.uploads[-1]["weights"] == (place / "adapters" / "sketches" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def live(talking: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving_bundle(talking, tmp_path_factory.mktemp("state")) as live:
        with Client(live.url, live.keys["acme", "deploy"], timeout=100) as client:
            client.register("support", talking.path.parent / "a")
        yield live


def test_a_change_without_an_answer_is_made_once(
    live: Live, talking: Bundle, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = blocks("python", "if_match")
    service, key = live.served.service, live.keys["acme", "deploy"]
    register = service.register

    async def without_an_answer(*given: Any, **named: Any) -> dict[str, Any]:
        monkeypatch.setattr(service, "register", register)
        await register(*given, **named)
        raise Unavailable("answer", problem="a part of the cluster was replaced")

    shutil.copytree(talking.path.parent / "a", place / "adapters" / "sketches", dirs_exist_ok=True)
    with Client(live.url, key, timeout=100) as client:
        before = client.register("sketches", place / "adapters" / "sketches")["etag"]
        monkeypatch.setattr(service, "register", without_an_answer)
        shown = run(live, place, sys.executable, "-c", text, key=key)
        task = client.task("sketches")
    assert [version["version"] for version in task["versions"]] == ["1", "2"]
    assert shown.splitlines()[0] == f"{task['etag']} {{'current': '2'}}"
    assert task["etag"] != before


def generated(live: Live, tokens: list[int], text: ModelText) -> str:
    [made] = live.served.runtime.generate([tokens], "a", max_new_tokens=12, sampling=text.sampling())
    return text.decode(made)


@pytest.mark.parametrize("package", ["tpeft_deploy", "openai", "langchain_openai", "litellm"])
def test_clients_of_text_get_the_text_of_the_runtime(live: Live, talking: Bundle, place: Path, package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    (code,) = [
        block for block in blocks("python", "pieces = ") if f"from {package} " in block or f"import {package}" in block
    ]
    key = live.keys["acme", "infer"]
    found, pieces, letters = json.loads(run(live, place, sys.executable, "-c", code + SHOW_TEXT, key=key))
    text = ModelText.open(talking)
    wanted = generated(live, text.chat([{"role": "user", "content": QUESTION}]), text)
    assert found == "".join(pieces) == wanted
    assert len(pieces) > 2
    if letters is not None:
        assert letters == [generated(live, text.encode(prompt), text) for prompt in ("Dear customer,", "Hello,")]


@pytest.mark.skipif(find_spec("openai") is None, reason="openai is not installed")
def test_the_lines_of_the_readme_stream_what_the_runtime_generates(live: Live, talking: Bundle, place: Path) -> None:
    [code] = [block.text for block in documents.blocks(README) if "OpenAI(" in block.text]
    assert len([line for line in code.splitlines() if line]) == 5
    with Client(live.url, live.keys["acme", "deploy"], timeout=100) as client:
        client.register("code", talking.path.parent / "a")
    text = ModelText.open(talking)
    sampling = text.sampling()
    assert not sampling.temperature  # else the texts would differ
    [made] = live.served.runtime.generate([text.encode("def ")], "a", max_new_tokens=100, sampling=sampling)
    assert run(live, place, sys.executable, "-c", code, key=live.keys["acme", "infer"]) == text.decode(made)


def test_curl_gets_the_text_of_the_runtime(live: Live, talking: Bundle, place: Path) -> None:
    (code,) = blocks("sh", "/v1/chat/completions")
    answer = json.loads(run(live, place, "sh", "-ec", code, key=live.keys["acme", "infer"]))
    text = ModelText.open(talking)
    wanted = generated(live, text.chat([{"role": "user", "content": QUESTION}]), text)
    assert answer["choices"][0]["message"]["content"] == wanted


@pytest.mark.skipif(find_spec("openai") is None, reason="openai is not installed")
def test_a_tool_is_called_and_its_result_is_answered(live: Live, place: Path) -> None:
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    (code,) = blocks("python", "tools = ")
    call, answer = run(live, place, sys.executable, "-c", code, key=live.keys["acme", "infer"]).split("\n", 1)
    assert call in {"track {'carrier': 'dhl'}", "track {'carrier': 'ups'}"}
    assert answer.strip()


def test_embeddings_are_those_of_the_texts(peer: Peer, place: Path) -> None:
    found = blocks("python", "vectors")
    assert len(found) == 2
    for code in found:
        vectors = json.loads(run(peer, place, sys.executable, "-c", code + SHOW_VECTORS))
        assert vectors == [[len(QUESTION), 4], [len("It never came."), 3]]
