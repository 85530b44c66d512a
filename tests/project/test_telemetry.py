"""ONNX Runtime reports to its vendor unless told otherwise before it is loaded: nothing of ours lets it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tpeft_deploy import Bundle

ROOT = Path(__file__).parents[2]
ON, OFF = {"ORT_DISABLE_TELEMETRY": "0"}, dict[str, str]()
# All that a watched process has of the environment.  ONNX Runtime is silent where a variable of a CI service stands.
KEPT = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "OMP_NUM_THREADS")
SECONDS = 240.0  # it reports 7 s after it has made a session, and again every 6 s
# Writes down every host name that is looked up, and finds none of them.
WATCH = r"""
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
  FILE *file = fopen(getenv("LOOKUPS"), "a");
  if (file) { fprintf(file, "%s\n", node ? node : ""); fclose(file); }
  return EAI_FAIL;
}
"""
LIBRARY = """
import sys
import numpy as np
from tpeft_deploy import Runtime
from tpeft_deploy.exporters.oracle import compare as gate
runtime = Runtime(sys.argv[1], provider="cpu")
runtime.run({"pixels": np.ones((1, 1, 12, 14), np.float32)}, task="base")
print("ready", flush=True)
sys.stdin.read()
"""
SERVER = """
import sys
from tpeft_deploy.cli import main
main(["serve", sys.argv[1], "--state", sys.argv[2], "--port", "0", "--provider", "cpu"])
"""


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("watching name look-ups needs Linux and a C compiler")
    place = tmp_path_factory.mktemp("watch")
    (place / "watch.c").write_text(WATCH)
    (place / "watch.pem").write_text("")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", place / "watch.so", place / "watch.c"], check=True)
    return place / "watch.so"


@contextmanager
def watched(
    watch: Path, home: Path, ready: str, extra: dict[str, str], code: str, *arguments: object
) -> Iterator[None]:
    """A process whose host name look-ups go to `home/lookups`, from when it has said that it is ready."""
    home.mkdir()
    own = {name: os.environ[name] for name in KEPT if name in os.environ}
    own |= {"HOME": str(home), "LOOKUPS": str(home / "lookups"), "LD_PRELOAD": str(watch), **extra}
    # It is silent too where there are no certificates, as on small images; none of these is ever looked at.
    own["SSL_CERT_FILE"] = str(watch.with_suffix(".pem"))
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, env=own, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        seen = []
        for line in process.stdout:
            seen.append(line)
            if line.startswith(ready):
                yield
                return
        raise AssertionError("".join(seen))
    finally:
        process.kill()
        process.communicate()


def reports(home: Path) -> list[str]:
    """Look-ups, and files that ONNX Runtime keeps for its reports."""
    lookups = home / "lookups"
    kept = [str(path.relative_to(home)) for path in home.rglob("*") if "onnxruntime" in path.name]
    return (lookups.read_text().split() if lookups.exists() else []) + kept


def has_reported(found: list[str]) -> bool:
    """Whether a host of the vendor was looked up, and a database kept."""
    return any(name.endswith(".com") for name in found) and any("onnxruntime" in name for name in found)


@pytest.mark.thorough
def test_neither_library_nor_server_reports_while_one_that_is_asked_to_does(
    conv_bundle: Bundle, tmp_path: Path, watch: Path
) -> None:
    homes = {name: tmp_path / name for name in ("asked", "library", "server")}
    with ExitStack() as stack:
        for name, extra, ready, code, arguments in (
            ("library", OFF, "ready", LIBRARY, []),
            ("server", OFF, "serving on", SERVER, [tmp_path / "state"]),
            ("asked", ON, "ready", LIBRARY, []),
        ):
            stack.enter_context(watched(watch, homes[name], ready, extra, code, conv_bundle.path, *arguments))
        # The one that reports shows that this test would see it, and that the others had the time to.
        until = time.monotonic() + SECONDS
        while not has_reported(found := reports(homes["asked"])) and time.monotonic() < until:
            time.sleep(0.1)
        assert has_reported(found), found
        assert reports(homes["library"]) == []
        assert reports(homes["server"]) == []


def test_the_environment_decides_and_is_read_first(tmp_path: Path) -> None:
    code = "import os, tpeft_deploy; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for given, expected in ((ON, "0"), (OFF, "1")):
        own = {name: value for name, value in os.environ.items() if not name.startswith("ORT_")}
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=own | given, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == expected
