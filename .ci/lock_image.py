"""Write image/cpu.txt and image/gpu.txt: what the image installs, each file by its SHA-256.

    python .ci/lock_image.py

Versions are those of constraints.txt.  Hashes are of all wheels of a version that the package index lists, so that the
image builds on other processors too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUILD = [("setuptools", "84.2.1")]  # builds the wheel of tpeft_deploy
_JSON = "application/vnd.pypi.simple.v1+json"


def resolved(provider: str) -> list[tuple[str, str]]:
    """Name and version of every package that the image needs, without tpeft_deploy."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.json"
        extras = f"{ROOT}[server,postgres,{provider}]"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*pip, "--constraint", ROOT / "constraints.txt", "--report", report, extras], check=True)
        document: dict[str, Any] = json.loads(report.read_text())
    found = [(one["metadata"]["name"], one["metadata"]["version"]) for one in document["install"]]
    return sorted((name.lower(), version) for name, version in found if name.lower() != "tpeft-deploy")


def hashes(index: str, name: str, version: str) -> list[str]:
    """SHA-256 of each wheel of a version."""
    page = urllib.request.Request(f"{index.rstrip('/')}/{name.lower().replace('_', '-')}/", headers={"Accept": _JSON})
    with urllib.request.urlopen(page, timeout=60) as answer:
        files = json.load(answer)["files"]
    start = f"{name.replace('-', '_').replace('.', '_')}-{version}-".lower()
    wheels = [one for one in files if one["filename"].lower().replace(".", "_").startswith(start.replace(".", "_"))]
    found = sorted({one["hashes"]["sha256"] for one in wheels if one["filename"].endswith(".whl")})
    if not found:
        raise SystemExit(f"the index has no wheel of {name} {version}")
    return found


def main() -> None:
    configured = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True, check=False
    )
    index = configured.stdout.strip() or "https://pypi.org/simple"
    for provider in ("cpu", "gpu"):
        lines = [f"# Written by .ci/lock_image.py: what the image installs for PROVIDER={provider}."]
        for name, version in [*resolved(provider), *BUILD]:
            own = " \\\n".join(f"    --hash=sha256:{one}" for one in hashes(index, name, version))
            lines.append(f"{name}=={version} \\\n{own}")
        (ROOT / "image" / f"{provider}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
