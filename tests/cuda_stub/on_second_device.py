"""Serves a bundle on the second of the stub's two devices; prints what is said of a third, which is not there.

LD_LIBRARY_PATH=STUB CUDA_STUB_LOG=FILE STUB/venv/bin/python -m tests.cuda_stub.on_second_device BUNDLE
"""

from __future__ import annotations

import sys

from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.errors import ProviderUnavailable


def main(path: str) -> None:
    """Serve twice, plainly and recorded."""
    inputs = Bundle.open(path).example()
    for graphs in (False, True):
        with Runtime(path, provider="cuda:1", cuda_graphs=graphs) as runtime:
            for task in [*runtime.tasks, "base"]:
                runtime.run(inputs, task)
                runtime.run(inputs, task)
    try:
        Runtime(path, provider="cuda:2")
    except ProviderUnavailable as error:
        print(error)


if __name__ == "__main__":
    main(sys.argv[1])
