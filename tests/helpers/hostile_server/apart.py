"""Uploads for a pool of readers: attacks, a reader that misbehaves when it is told to, and ways to send them."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tpeft_deploy import Adapter
from tpeft_deploy.errors import TpeftError
from tpeft_deploy.runtime.server.isolation import reader
from tpeft_deploy.runtime.server.isolation.parsing_limits import ParsingLimits
from tpeft_deploy.runtime.server.isolation.pool import Pool
from tpeft_deploy.runtime.server.isolation.process import Outcome

NAMES = {"weights": reader.WEIGHTS_FILE, "config": reader.CONFIG_FILE}
OF = "the upload for task 'mood'"

# The reader's program, but that it does what an upload's first word says.
ACTS = f"""
import importlib.util, os, signal, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("reader", {reader.__file__!r})
reader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reader)

def break_bundle(directory):
    from tpeft_deploy.errors import IntegrityError
    reader.read = lambda *_: (_ for _ in ()).throw(IntegrityError("open bundle /a/secret/place"))
    return own(None, directory, "x")

def stumble(directory):
    reader.read = lambda *_: [].pop()
    return own(None, directory, "x")

def allocate(directory):
    kept = []
    while True:
        kept.append(bytearray(1 << 20))

def spin(directory):
    while True:
        pass

def wait(directory):
    (directory / "pid").write_text(str(os.getpid()))
    time.sleep(1000)

def crash(directory):
    os.kill(os.getpid(), signal.SIGSEGV)

def garbage(directory):
    (directory / reader.RESULT).write_bytes(os.urandom(1000))

def empty(directory):
    pass

def refuse_with_garbage(directory):
    (directory / reader.REFUSAL).write_bytes(b"[" * 60000)

def refuse_as_another(directory):
    (directory / reader.REFUSAL).write_text('{{"kind": "Unauthenticated", "text": "a\\\\nb", "trace": 5}}')

def link(directory):
    (directory / reader.RESULT).symlink_to("/etc/passwd")

def pipe(directory):
    os.mkfifo(directory / reader.RESULT)

def write(directory):
    with (directory / reader.RESULT).open("wb") as file:
        while True:
            file.write(bytes(1 << 20))

def flood(directory):
    os.write(1, b"x" * 100000)

def head(directory):
    (directory / reader.RESULT).write_bytes((1 << 30).to_bytes(8, "little") + bytes(1000))

def kill_reader(directory):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)

def open_files(directory):
    kept = []
    while True:
        kept.append(open("/dev/null"))

def convert(bundle, directory, of):
    weights = directory / reader.WEIGHTS_FILE
    word = weights.read_bytes()[:20].decode(errors="replace").strip() if weights.exists() else ""
    if word in acts:
        try:
            acts[word](directory)
        except MemoryError:
            return reader.NO_MEMORY
        return 0
    return own(bundle, directory, of)

acts = {{name: act for name, act in globals().items() if callable(act) and name != "convert"}}
own, reader._convert = reader._convert, convert
reader.main(int(sys.argv[1]), Path(sys.argv[2]))
"""


class Observed(list[Outcome]):
    """How uploads ended."""

    def check(self, limits: ParsingLimits) -> None:
        for outcome in self:
            assert outcome.cpu <= limits.cpu_seconds + 1
            assert outcome.rss <= limits.memory_bytes + (100 << 20)  # an idle reader's

    def summary(self) -> str:
        ended = sum(outcome.status != 0 for outcome in self)
        return (
            f"{ended} of {len(self)} ended by limits, at most {max(o.cpu for o in self):.2f} s and "
            f"{max(o.rss for o in self) >> 20} MiB"
        )


def act(name: str) -> dict[str, bytes]:
    """An upload that `ACTS` acts on."""
    return {"weights": name.ljust(20).encode()}


def safetensors(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A file of zeros."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def peft(module: str, kind: str, **config: object) -> dict[str, bytes]:
    """A PEFT adapter of one module that the base does not have."""
    names = {"LORA": {"lora_A": (2, 8), "lora_B": (16, 2)}, "IA3": {"ia3_l": (16, 1)}}[kind]
    shapes = {f"base_model.model.{module}.{name}{'.weight' * (kind == 'LORA')}": s for name, s in names.items()}
    known = {"peft_type": kind, "r": 2, "lora_alpha": 2, "target_modules": [module]}
    return {"weights": safetensors(shapes), "config": json.dumps({**known, **config}).encode()}


LONG = "a" * 40 + "b"
ATTACKS = {
    "alpha_pattern": peft(LONG, "LORA", alpha_pattern={"(a+)+$": 8}),
    "rank_pattern": peft(LONG, "LORA", rank_pattern={"(a+)+$": 8}),
    "feedforward_modules": peft("up", "IA3", feedforward_modules="(?:.?){20000}x"),
    "many patterns": peft("up", "LORA", alpha_pattern={f"(x|y)*{n:06d}": 8 for n in range(16000)}),
    "rank claimed": {
        "weights": safetensors({"up.lokr_w1_a": (4, 0), "up.lokr_w1_b": (0, 35000), "up.lokr_w2": (35000, 0)})
    },
    "nested": {"weights": (10000).to_bytes(8, "little") + b"[" * 10000, "config": b"{}"},
}


@contextmanager
def staged(parts: Mapping[str, bytes]) -> Iterator[Path]:
    """A directory with the files of an upload."""
    with tempfile.TemporaryDirectory() as place:
        for part, data in parts.items():
            (Path(place) / NAMES[part]).write_bytes(data)
        yield Path(place)


async def send(pool: Pool, parts: Mapping[str, bytes], tenant: str = "acme") -> Adapter | TpeftError:
    """What a pool makes of an upload; other errors than ours are raised."""
    with staged(parts) as place:
        return await send_staged(pool, place, tenant)


async def send_staged(pool: Pool, place: Path, tenant: str) -> Adapter | TpeftError:
    try:
        return (await pool.read(tenant, place, OF)).adapter
    except TpeftError as error:
        text = str(error)
        assert str(place) not in text
        assert not re.search(r"\n|Traceback|\.py\b", text), text
        return error


def sent(pool: Pool, parts: Mapping[str, bytes], tenant: str = "acme") -> Adapter | TpeftError:
    return asyncio.run(send(pool, parts, tenant))
