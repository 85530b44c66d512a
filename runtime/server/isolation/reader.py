"""Reader: a small process that forks a child per upload; the child parses the upload under limits and exits.

The server runs this file as a program (`process`), so nothing of the server, ONNX Runtime or torch is imported here.
The parent does not parse uploads: it forks, waits, and reports the outcome.  Limits therefore apply per upload, and an
upload affects neither the server nor the next upload.

    stdin    a line of JSON for each upload; an empty line aborts the current upload; end of file ends the process
    stdout   "ready", then a line of JSON for each upload: exit status and resource usage of its process
    files    in the upload's directory, RESULT, the canonical adapter, or REFUSAL, a line of JSON
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import safetensors.numpy  # noqa: F401  # otherwise each fork would import it

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import AdapterError, ProtocolError, TpeftError
from tpeft_deploy.formats import load_adapter

__all__ = ["CONFIG_FILE", "NO_FORK", "NO_MEMORY", "REFUSAL", "RESULT", "WEIGHTS_FILE", "main", "read"]

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
RESULT, REFUSAL = "result.safetensors", "refusal.json"
NO_MEMORY, BROKEN, NO_FORK = 3, 4, 5  # exit statuses without a REFUSAL file

_FILES = 64
_NICE = 10  # inference has priority
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_LONGEST = 4000


def read(bundle: Bundle, directory: Path, of: str) -> Adapter:
    """Read the adapter of an upload, whatever its format, and fit it to a bundle.

    Args:
        bundle: bundle that is to serve the adapter.
        directory: directory of the upload's files.
        of: name of the upload in messages, in place of file names.

    Raises:
        ProtocolError: the upload has no weights.
        AdapterError: the adapter cannot be read, or does not fit the base.
    """
    weights, manifest = directory / WEIGHTS_FILE, bundle.manifest
    if not weights.exists():
        raise ProtocolError(f"read {of}", expected="a part 'weights' with the adapter", got="none")
    place = directory if (directory / CONFIG_FILE).exists() else weights
    base = replace(bundle.base_view, name=f"bundle {manifest.name!r}")  # keeps the path out of messages
    try:
        found = load_adapter(place, base=base)
    except TpeftError as error:
        text = str(error).replace(str(weights), of).replace(str(directory), of)
        raise type(error)(text) from error
    found = replace(found, source=of)  # also for later messages
    bundle.fill(found, bundle=repr(manifest.name))
    return found


def main(server: int, bundle: Path) -> None:
    """Read uploads until stdin ends.

    Args:
        server: process id of the server.
        bundle: path of the bundle.
    """
    _end_with(server)
    os.nice(_NICE)
    answers = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.close(null)
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    opened = Bundle.open(bundle)
    gc.freeze()
    os.write(answers, b"ready\n")
    for job in _jobs():
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError:  # too many processes, or no memory
            answer: dict[str, object] = {"status": NO_FORK << 8, "late": False, "cpu": 0.0, "rss": 0}
        else:
            if not pid:
                _fork(opened, job, parent, [answers, woken, wakes])
            answer = _wait(pid, woken, float(job["wall_seconds"]))
        os.write(answers, json.dumps(answer).encode() + b"\n")


def _jobs() -> Iterator[dict[str, Any]]:
    rest = b""
    while piece := os.read(0, 1 << 16):
        *lines, rest = (rest + piece).split(b"\n")
        for line in filter(None, lines):
            yield json.loads(line)


def _wait(pid: int, woken: int, seconds: float) -> dict[str, object]:
    """Wait for a fork and return its outcome; kill it on timeout or abort."""
    until, late = time.monotonic() + seconds, False
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            cpu = usage.ru_utime + usage.ru_stime
            return {"status": status, "late": late, "cpu": cpu, "rss": usage.ru_maxrss * 1024}
        left = max(0.0, until - time.monotonic())
        ready, _, _ = select.select([0, woken], [], [], None if late else left)
        if woken in ready:
            os.read(woken, 4096)
        if 0 in ready or not ready:
            late = late or not ready
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            if 0 in ready and not os.read(0, 1 << 16):
                sys.exit()


def _fork(bundle: Bundle, job: dict[str, Any], parent: int, handles: list[int]) -> NoReturn:
    """Parse one upload and exit."""
    status = BROKEN
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for standard in (0, 2):
            os.dup2(1, standard)  # the child communicates by files only
        for handle in handles:
            os.close(handle)
        _end_with(parent)
        _limit(job)
        status = _convert(bundle, Path(job["directory"]), str(job["of"]))
    finally:
        os._exit(status)


def _convert(bundle: Bundle, directory: Path, of: str) -> int:
    try:
        (directory / RESULT).write_bytes(read(bundle, directory, of).to_bytes())
    except MemoryError:
        return NO_MEMORY
    except (AdapterError, ProtocolError) as error:
        refusal = {"kind": type(error).__name__, "text": str(error)[:_LONGEST]}
    except OSError as error:
        refusal = {"kind": "OSError", "text": errno.errorcode.get(error.errno or 0, "EIO")}
    except Exception as error:  # unexpected error, possibly of the server: reported to its log
        refusal = {"kind": type(error).__name__, "text": "", "trace": traceback.format_exc()[-_LONGEST:]}
    else:
        return 0
    (directory / RESULT).unlink(missing_ok=True)  # the disk may be full
    (directory / REFUSAL).write_text(json.dumps(refusal))
    return 0


def _limit(job: dict[str, Any]) -> None:
    import resource

    cpu = int(job["cpu_seconds"])
    limits = {
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_CPU: (cpu, cpu + 1),  # with equal limits SIGKILL would hide the reason
        resource.RLIMIT_NOFILE: (_FILES, _FILES),
        resource.RLIMIT_FSIZE: (int(job["result_bytes"]),) * 2,
        resource.RLIMIT_NPROC: (0, 0),
    }
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = (used + int(job["memory_bytes"]),) * 2
    for kind, wanted in limits.items():
        most = resource.getrlimit(kind)[1]
        allowed = [limit if most == resource.RLIM_INFINITY else min(limit, most) for limit in wanted]
        resource.setrlimit(kind, (allowed[0], allowed[1]))


def _end_with(parent: int) -> None:
    """Make the kernel kill this process when its parent ends for any reason."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before prctl
        os._exit(BROKEN)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
