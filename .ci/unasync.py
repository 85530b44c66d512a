"""Write tpeft_deploy/client/blocking.py from asynchronous.py: the same client without async and await.

python .ci/unasync.py [--check]
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).parents[1] / "tpeft_deploy" / "client"
HEADER = "# Written by .ci/unasync.py from asynchronous.py; change that file, then run `make client`.\n"
REPLACEMENTS = [
    (r", for asyncio; a cancelled call leaves the server's queue", "; safe to use from several threads"),
    (r"\b(A|a)synchronous client\b", lambda found: "Blocking client" if found[1] == "A" else "blocking client"),
    (r"\b(async|await) ", ""),
    (r"\bAsync(Client|BaseTransport)\b", r"\1"),
    (r"\b__a(enter|exit)__\b", r"__\1__"),
    (r"\ba(close|iter_bytes)\b", r"\1"),
    (r"\basync_deadline\b", "deadline"),
    (r"\b_clock\.pause\b", "_clock.sleep"),
]


def blocking() -> str:
    """The text of blocking.py."""
    text = (CLIENT / "asynchronous.py").read_text()
    for pattern, replacement in REPLACEMENTS:
        text, count = re.subn(pattern, replacement, text)
        assert count, f"asynchronous.py has nothing like {pattern}"
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", CLIENT / "blocking.py", "-"]
    return subprocess.run(ruff, input=HEADER + text, capture_output=True, text=True, check=True).stdout


def main() -> None:
    place = CLIENT / "blocking.py"
    if sys.argv[1:] != ["--check"]:
        place.write_text(blocking())
    elif place.read_text() != blocking():
        raise SystemExit("blocking.py is not what asynchronous.py makes: run `make client`")


if __name__ == "__main__":
    main()
