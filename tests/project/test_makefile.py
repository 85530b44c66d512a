"""What make prints on the way to the quickstart."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$*" in
*" --quiet --quiet "*) echo "$@" >> {log} ;;
*) echo "WARNING: Running pip as the 'root' user" >&2 ;;
esac
"""


def test_make_quickstart_prints_nothing_that_is_not_ours(tmp_path: Path) -> None:
    folder, log = tmp_path / "venv" / "bin", tmp_path / "log"
    folder.mkdir(parents=True)
    for name, script in {
        "python": PYTHON.format(log=log),
        "tpeft-deploy": '#!/bin/sh\necho "the command: $*"\n',
        "nvidia-smi": "#!/bin/sh\nexit 1\n",
    }.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    place = tmp_path / "venv"
    done = subprocess.run(
        ["make", "--no-print-directory", "quickstart", f"VENV={place}", "OUT=here"],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f"installing tpeft-deploy for cpu into {place} (a few minutes the first time)",
        "the command: quickstart --out here",
    ]
    [installed] = log.read_text().splitlines()
    assert {"--disable-pip-version-check", "--root-user-action=ignore", "--constraint"} <= set(installed.split())
