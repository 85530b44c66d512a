"""Garbage collection of a process that serves, in a fresh process: it cannot be undone."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import gc
from tpeft_deploy.runtime.heap import settle_heap
assert gc.get_freeze_count() == 0
there = len(gc.get_objects())
settle_heap()
print(gc.get_freeze_count() > there // 2, len(gc.get_objects()) < there // 10, *gc.get_threshold())
"""


def test_what_is_there_is_frozen_and_collections_become_rarer() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["True", "True", "20000", "20", "20"]
