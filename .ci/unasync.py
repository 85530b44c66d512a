"""Write tpeft_deploy/client/blocking/ from asynchronous/: the same client without async and await.

python .ci/unasync.py [--check]
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).parents[1] / "tpeft_deploy" / "client"
HEADER = "# Written by .ci/unasync.py from asynchronous/{}; change that file, then run `make client`.\n"
REPLACEMENTS = [
    (r", for asyncio; a cancelled call leaves the server's queue", "; safe to use from several threads"),
    (r"\b(A|a)synchronous client\b", lambda found: "Blocking client" if found[1] == "A" else "blocking client"),
    (r"\bclient\.asynchronous\b", "client.blocking"),
    (r"\b(async|await) ", ""),
    (r"\b(Stop|)Async(?=[A-Z])", r"\1"),
    (r"\bAwaitable\[(\w+)\]", r"\1"),
    (r"\bAwaitable, ", ""),
    (r"\b__a(enter|exit|iter|next)__\b", r"__\1__"),
    (r"\ba(close|iter_bytes|next)\b", r"\1"),
    (r"\basync_deadline\b", "deadline"),
    (r"\b_clock\.pause\b", "_clock.sleep"),
]


def blocking() -> dict[str, str]:
    """The texts of blocking/, by the names of the files."""
    texts = {file.name: file.read_text() for file in sorted((CLIENT / "asynchronous").glob("*.py"))}
    for pattern, replacement in REPLACEMENTS:
        assert any(re.search(pattern, text) for text in texts.values()), f"asynchronous/ has nothing like {pattern}"
        texts = {name: re.sub(pattern, replacement, text) for name, text in texts.items()}
    return {name: _formatted(name, HEADER.format(name) + text) for name, text in texts.items()}


def _formatted(name: str, text: str) -> str:
    ours = 'lint.isort.known-first-party=["tpeft_deploy"]'  # also modules that are not written yet
    for command in (["check", "--select", "I", "--config", ours, "--fix", "--quiet"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", CLIENT / "blocking" / name, "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


def main() -> None:
    place = CLIENT / "blocking"
    if sys.argv[1:] != ["--check"]:
        place.mkdir(exist_ok=True)
        for file in place.glob("*.py"):
            file.unlink()
        for name, text in blocking().items():
            (place / name).write_text(text)
    elif {file.name: file.read_text() for file in place.glob("*.py")} != blocking():
        raise SystemExit("blocking/ is not what asynchronous/ makes: run `make client`")


if __name__ == "__main__":
    main()
