"""The listener of a model agent: what it loads, for whom, and what it never reads."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import httpx
import pytest

from tests.helpers.server.processes import server
from tests.server.conftest import Served
from tpeft_deploy import Adapter, Bundle
from tpeft_deploy.runtime.server.model_agent import AgentDirectory, agent_application
from tpeft_deploy.runtime.server.settings import Settings

PATH = "/v2/repository/models"


def put(directory: Path, name: str, adapter: Adapter) -> Path:
    """Leave an adapter as KServe's agent does: the files, and one that says for which source."""
    folder = directory / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter.safetensors").write_bytes(adapter.to_bytes())
    (folder / f"SUCCESS.{'0' * 64}").write_text("{}")
    return folder


def ask(
    served: Served, directory: Path, *paths: str, method: str = "POST", host: str = "localhost:8080"
) -> list[httpx.Response]:
    async def main() -> list[httpx.Response]:
        application = agent_application(served.service, AgentDirectory(directory), "agent", readers=2)
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            asked = [client.request(method, path, content=b"{}", headers={"host": host}) for path in paths]
            return list(await asyncio.gather(*asked))

    return asyncio.run(main())


def test_adapters_of_the_directory_are_loaded_and_unloaded(
    served: Served, tmp_path: Path, others: list[Adapter]
) -> None:
    for number, adapter in enumerate(others):
        put(tmp_path, f"mood-{number}", adapter)
    loads = [f"{PATH}/mood-{number}/load" for number in range(len(others))]
    assert [(one.status_code, one.json()) for one in ask(served, tmp_path, *loads)] == [(200, {})] * len(others)
    found = {record.name: record for record in served.state.tasks.snapshot().owned("agent")}
    assert sorted(found) == ["mood-0", "mood-1", "mood-2"]
    assert {record.version("").by for record in found.values()} == {"model-agent"}
    (unloaded,) = ask(served, tmp_path, f"{PATH}/mood-0/unload")
    assert unloaded.status_code == 200
    assert ("agent", "mood-0") in served.state.placements.now.unloaded


def test_the_same_adapter_again_is_no_new_version_and_another_one_is(
    served: Served, tmp_path: Path, others: list[Adapter]
) -> None:
    def numbers() -> list[int]:
        put(tmp_path, "mood", others[len(asked)])
        (answer,) = ask(served, tmp_path, f"{PATH}/mood/load")
        assert answer.status_code == 200, answer.text
        return sorted(served.state.tasks.snapshot().task("agent", "mood").versions)

    asked: list[int] = []
    assert (numbers(), numbers()) == ([1], [1])
    asked.append(1)
    assert numbers() == [1, 2]


def test_nothing_outside_of_the_directory_is_read(served: Served, tmp_path: Path, others: list[Adapter]) -> None:
    outside = put(tmp_path, "outside", others[0])
    directory = tmp_path / "models"
    directory.mkdir()
    (directory / "linked").symlink_to(outside)
    folder = directory / "file-linked"
    folder.mkdir()
    (folder / "a.safetensors").symlink_to(outside / "adapter.safetensors")
    pipe = directory / "pipe"
    pipe.mkdir()
    os.mkfifo(pipe / "a.safetensors")
    (directory / "empty").mkdir()
    names = ["..%2Foutside", "%2e%2e", "..", "linked", "file-linked", "pipe", "empty", "absent", "%2Fetc", "a%00b"]
    answers = ask(served, directory, *(f"{PATH}/{name}/load" for name in names))
    assert {one.status_code for one in answers} <= {400, 404}
    assert not served.state.tasks.snapshot().own("agent", "outside")
    assert all(str(tmp_path) not in one.text for one in answers)


def test_it_answers_only_this_machine_and_only_these_calls(
    served: Served, tmp_path: Path, others: list[Adapter]
) -> None:
    put(tmp_path, "mood", others[0])
    (foreign,) = ask(served, tmp_path, f"{PATH}/mood/load", host="evil.example")
    assert foreign.status_code == 403
    (read,) = ask(served, tmp_path, f"{PATH}/mood/load", method="GET")
    assert read.status_code == 405
    paths = ("/v2", "/metrics", "/v2/registry/tasks", "/v2/admin/keys", "/v2/models/base/infer")
    assert {one.status_code for one in ask(served, tmp_path, *paths)} == {404}


def test_a_server_has_both_ports_only_if_they_are_set(
    conv_bundle: Bundle, tmp_path: Path, others: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (Settings().agent_models, Settings().metrics_port) == (None, None)
    put(tmp_path / "models", "mood", others[0])
    for name, value in {"agent_models": tmp_path / "models", "agent_port": 0, "metrics_port": 0}.items():
        monkeypatch.setenv(f"TPEFT_{name.upper()}", str(value))
    said: list[str] = []
    with server(conv_bundle.path, "--state", tmp_path / "state", "--port", 0, "--threads", 1, said=said) as (run, url):
        assert run.stderr is not None
        agent = run.stderr.readline().split()[-1]
        metrics = next(line.split()[-1] for line in said if "metrics without a key" in line)
        assert httpx.post(f"http://{agent}{PATH}/mood/load", json={}, timeout=100).status_code == 200
        assert httpx.post(f"{url}{PATH}/mood/load", json={}, timeout=100).status_code == 401
        assert 'tpeft_adapters{tier="disk"}' in httpx.get(f"{metrics}/metrics", timeout=100).text
        run.terminate()
        assert run.wait(timeout=100) == 0
