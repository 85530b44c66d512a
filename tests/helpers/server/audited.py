"""The server as `tpeft-deploy serve` starts it, under `python -O`, with an account of what it opens and calls.

Whatever a test asserts stays an assertion of the test's own process: were a check of the server an `assert`, it would
be gone here.  Every refusal that a test gets through this is looked at for what it tells of the server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.message import Message

from tests.helpers.server.asking import Asking
from tests.helpers.server.rpc_serving import key_of
from tests.server.conftest import PIXELS
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.server.isolation import reader
from tpeft_deploy.runtime.server.registry import open_keys
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.methods import METHODS, SERVICE

ROOT = Path(__file__).parents[3]
KEYS = [
    ("acme", "infer"), ("acme", "deploy"), ("acme", "admin"), ("rival", "infer"), ("rival", "deploy"),
    ("operator", "admin"),
]  # fmt: skip
ONLY_ERROR = {"error"}
_READER_FILE = "reader.py"
# Of what an audit hook is told: all that runs somebody's code, asks somebody else, or reads and writes files.
_ACCOUNT = """
import json, os, sys
foreign = set("torch onnx onnxscript yaml dill cloudpickle joblib transformers peft huggingface_hub requests".split())
runs = set("pickle.find_class subprocess.Popen os.system os.exec os.posix_spawn os.fork socket.connect "
           "socket.getaddrinfo urllib.Request ftplib.connect shutil.unpack_archive".split())
def hook(event, arguments):
    if event == "open":
        told = [str(arguments[0]), str(arguments[1])]
    elif event in runs or event == "import" and arguments[0].partition(".")[0] in foreign:
        told = [repr(arguments)[:1000]]
    else:
        return
    os.write(kept, (json.dumps([event, *told]) + "\\n").encode())
os.write(kept, (json.dumps(["debug", __debug__]) + "\\n").encode())
sys.addaudithook(hook)
"""
_HOOK = f"""
import os, sys
kept = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
{_ACCOUNT}
from tpeft_deploy.runtime.server.isolation import reader
reader.__file__ = sys.argv.pop(1)
from tpeft_deploy.cli import main
main()
"""
# Its own child, which reads uploads, under the same account.
_READER = """
import os, runpy
kept = os.open({events!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
{account}
runpy.run_path({reader!r}, run_name="__main__")
"""


@dataclasses.dataclass(frozen=True)
class Told:
    """What came of a call over gRPC."""

    status: str
    text: str
    answers: Sequence[bytes]
    trailers: Mapping[str, str]


class Audited(Asking):
    """A server in a process of its own, on a directory of its own."""

    def __init__(self, place: Path, bundle: Path, process: subprocess.Popen[bytes], port: int, address: str) -> None:
        super().__init__(port, _read_keys(place))
        self.place = place
        self.process = process
        self.channel = grpc.insecure_channel(address)
        self._bundle = bundle
        self._from = len(self._lines())  # what it did to start is its own affair, but for `did_to_start`

    @property
    def state(self) -> Path:
        return self.place / "state"

    def ask(self, method: str, path: str, tenant: str = "acme", role: str = "deploy", **more: Any) -> httpx.Response:
        answer = super().ask(method, path, tenant, role, **more)
        if answer.is_error:
            self.check_refusal(answer)
        return answer

    def check_refusal(self, answer: httpx.Response) -> None:
        document = answer.json()
        assert set(document) == ONLY_ERROR
        openai = answer.request.url.path.startswith("/v1/")
        self.check_text(document["error"]["message"] if openai else document["error"])

    def check_text(self, text: str) -> None:
        """No paths, handles, keys or traces of the server in what a client is told."""
        for own in (str(self.place), str(self._bundle), str(ROOT), sys.prefix, "site-packages", "Traceback", "tpk_"):
            assert own not in text, text
        assert not re.search(r"\n|\bat 0x|\.py\b|\bline \d+, in ", text), text
        assert 0 < len(text) < 2000

    def call(
        self,
        rpc: str,
        message: Message | bytes = b"",
        tenant: str = "acme",
        role: str = "deploy",
        *,
        key: str | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        compression: Any = None,
    ) -> Told:
        """One call; `key` in the place of the tenant's own, empty for none."""
        data = message if isinstance(message, bytes) else message.SerializeToString()
        key = self.keys[tenant, role] if key is None else key
        known: dict[str, Any] = {"metadata": (*(key_of(key) if key else ()), *metadata), "timeout": 100}
        path = rpc if rpc.startswith("/") else f"/{SERVICE}/{rpc}"
        try:
            if rpc in METHODS and METHODS[rpc].stream:
                answers = [bytes(one) for one in self.channel.stream_stream(path)(iter([data]), **known)]
                return _of_stream(answers)
            answer, _ = self.channel.unary_unary(path).with_call(data, compression=compression, **known)
            return Told("OK", "", [answer], {})
        except grpc.RpcError as error:
            self.check_text(error.details() or "none")
            return Told(error.code().name, error.details(), [], dict(error.trailing_metadata()))

    def raw(self, data: bytes) -> bytes:
        """The beginning of the answer to bytes as they are."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=100) as client:
            client.sendall(data)
            return client.recv(65536)

    def did(self, *events: str) -> list[list[str]]:
        """What the process did of some kinds since it listens."""
        return [line for line in self._lines()[self._from :] if line[0] in events]

    def did_to_start(self) -> list[list[str]]:
        """What the process did until it listened."""
        return self._lines()[: self._from]

    def check_conduct(self) -> None:
        """All that holds of it whatever it was asked."""
        assert self.ran_nothing()
        assert self.opened_only_its_own()
        assert not [who for who, key in self.keys.items() if key in self.log()]

    def ran_nothing(self) -> bool:
        """Whether it ran no program but its readers of uploads, unpickled nothing, asked nobody and imported nothing
        that could; and whether a reader did nothing of this but fork.
        """
        reader = repr((sys.executable, [sys.executable, "-P", "-O", str(self.place / _READER_FILE)]))[:-2]
        others = [line for line in self._lines()[self._from :] if line[0] != "open"]
        others = [line for line in others if line[0] != "subprocess.Popen" or not line[1].startswith(reader)]
        others += [line for line in self._of_readers() if line[0] not in {"open", "os.fork", "debug"}]
        assert not others, others
        return True

    def opened_only_its_own(self) -> bool:
        """Whether it opened no file but those of its state, of the bundle, and Python's own."""
        own = (str(self.state), str(self._bundle), str(self.place / "temporary"), "/dev/null", "/proc/", "/sys/")
        code = (str(ROOT), sys.prefix, sys.base_prefix, str(Path(os.__file__).parent), *_packages())
        others = {
            path
            for _, path, mode in [*self.did("open"), *(line for line in self._of_readers() if line[0] == "open")]
            if not path.startswith(own)
            and not path.isdigit()
            and not (path.startswith(code) and (mode in {"r", "rb"} or "/__pycache__/" in path))
        }
        assert not others, others
        return True

    def memory(self, *, peak: bool = False) -> int:
        """Bytes that it has in memory, or had at most since `forget_peak`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None
        return 1024 * int(found[1])

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def log(self) -> str:
        return (self.place / "stderr").read_text(errors="replace")

    def _lines(self, file: str = "events") -> list[list[str]]:
        return [json.loads(line) for line in (self.place / file).read_text().splitlines()]

    def _of_readers(self) -> list[list[str]]:
        return self._lines("events.reader")


@contextlib.contextmanager
def audited(bundle: Bundle, place: Path, **settings: object) -> Iterator[Audited]:
    """A server on `place / "state"`, with settings as its environment has them.

    Tests make more changes a second than the default lets one key make.
    """
    (place / "temporary").mkdir(parents=True, exist_ok=True)
    if not (place / "keys.json").exists():
        _make_keys(place)
    known = {"TMPDIR": str(place / "temporary"), "OMP_NUM_THREADS": "1"}
    own = {f"TPEFT_{name.upper()}": str(value) for name, value in {"changes_per_s": 0, **settings}.items()}
    flags = ["--state", place / "state", "--port", 0, "--grpc-port", 0, "--threads", 1, "--provider", "cpu"]
    program = place / _READER_FILE
    program.write_text(_READER.format(events=str(place / "events.reader"), account=_ACCOUNT, reader=reader.__file__))
    command = [sys.executable, "-O", "-c", _HOOK, place / "events", program, "serve", bundle.path, *flags]
    with (place / "stderr").open("ab") as errors:
        begin = errors.tell()
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stdout=errors, stderr=errors, env=os.environ | known | own
        )
    try:
        port, address = _listening(process, place / "stderr", begin)
        found = Audited(place, bundle.path, process, port, address)
        with found.channel, found.client:
            yield found
    finally:
        process.kill()
        process.wait(100)


def infer_message(model: str) -> pb.ModelInferRequest:
    """The request of `test_rest.tensor`, over gRPC."""
    message = pb.ModelInferRequest(model_name=model, id="the same", raw_input_contents=[PIXELS.tobytes()])
    message.inputs.add(name="pixels", datatype="FP32", shape=PIXELS.shape)
    return message


def load_message(name: str, files: Mapping[str, bytes]) -> pb.RepositoryModelLoadRequest:
    message = pb.RepositoryModelLoadRequest(model_name=name)
    for key, data in files.items():
        message.parameters[key].bytes_param = data
    return message


def tree(place: Path) -> dict[str, str]:
    """Every file beneath a directory but the database's and the account's, with the digest of its content."""
    ours = {"events", "events.reader", "stderr"}
    return {
        str(file.relative_to(place)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(place.rglob("*"))
        if file.is_file() and not file.name.startswith("state.db") and str(file.relative_to(place)) not in ours
    }


def check_tree(place: Path, expected: dict[str, str]) -> None:
    """The files are those expected, but for adapters that nothing refers to, which the server removes now and then."""
    found = tree(place)
    with contextlib.closing(sqlite3.connect(f"file:{place / 'state' / 'state.db'}?mode=ro", uri=True)) as database:
        referred = {digest for (digest,) in database.execute("SELECT digest FROM versions")}
    swept = {name for name in expected.keys() - found.keys() if name.startswith("state/blobs/")}
    assert found == {name: digest for name, digest in expected.items() if name not in swept}
    assert not {Path(name).stem for name in swept} & referred


def _listening(process: subprocess.Popen[bytes], log: Path, begin: int) -> tuple[int, str]:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        text = log.read_bytes()[begin:].decode(errors="replace")
        http = re.search(r"^serving on http://\S+:(\d+)$", text, re.MULTILINE)
        rpc = re.search(r"^serving gRPC on (\S+)$", text, re.MULTILINE)
        if http and rpc:
            return int(http[1]), rpc[1]
        time.sleep(0.02)
    raise AssertionError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")


def _packages() -> list[str]:
    """Where Python's packages are: an environment may lie over another."""
    return [str(Path(place).resolve()) for place in sys.path if place.endswith("-packages")]


def _make_keys(place: Path) -> None:
    keys, database = open_keys(place / "state")
    made = {f"{tenant} {role}": keys.create(tenant, role, by="a test")[1] for tenant, role in KEYS}
    record, made["revoked admin"] = keys.create("revoked", "admin", by="a test")
    keys.revoke(record.id, by="a test")
    now = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now - 100)  # as of then
        made["expired admin"] = keys.create("expired", "admin", by="a test", expires=now - 50)[1]
    database.close()
    (place / "keys.json").write_text(json.dumps(made))


def _read_keys(place: Path) -> dict[tuple[str, str], str]:
    found = json.loads((place / "keys.json").read_text())
    return {(name.split()[0], name.split()[1]): key for name, key in found.items()}


def _of_stream(answers: Sequence[bytes]) -> Told:
    """A stream of one request tells what is wrong in its one answer."""
    (message,) = map(pb.ModelStreamInferResponse.FromString, answers)
    if message.error_message:
        return Told("ERROR", message.error_message, [], {})
    return Told("OK", "", [message.infer_response.SerializeToString()], {})
