"""Trial of an execution provider: a tiny session, run in this process, which a defective library may end.

`python -m tpeft_deploy.runtime.sessions.trial cuda` prints one JSON object for `tpeft-deploy doctor`.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from tpeft_deploy.errors import TpeftError, brief
from tpeft_deploy.runtime.sessions.providers import PROVIDERS, choose, open_session

__all__ = ["MODEL", "try_provider"]

# y = (2 x) @ [[1, 2], [3, 4]], as a convolution and a product: on CUDA the one needs cuDNN, the other cuBLAS.
MODEL = base64.b64decode(
    "CAgSADqlAQoVCgF4CgF3EgFjGgRjb252IgRDb252ChkKAWMKAW0SAXkaBm1hdG11bCIGTWF0TXVsEgV0cmlhbCoTCAEIAQgBCAEQAUIBd0oE"
    "AAAAQCobCAIIAhABQgFtShAAAIA/AAAAQAAAQEAAAIBAWhsKAXgSFgoUCAESEAoCCAEKAggBCgIIAgoCCAJiGwoBeRIWChQIARIQCgIIAQoC"
    "CAEKAggCCgIIAkIECgAQEQ=="
)
_X = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
_Y = np.array([[6, 8], [22, 32]], np.float32)


def try_provider(name: str) -> dict[str, Any]:
    """Open a session on a provider and compare its answer.

    Args:
        name: a name of `PROVIDERS`.

    Returns:
        `built`: whether this build of ONNX Runtime has the provider; `works`; and `reason`, a line.
    """
    execution = PROVIDERS[name]
    if execution.session_provider not in onnxruntime.get_available_providers():
        return {"built": False, "works": False, "reason": f"this onnxruntime was built without {execution.label}"}
    try:
        choice = choose(name)
        session = open_session(Path("trial.onnx"), choice, threads=1, content=MODEL)
        [answer] = session.run(None, {"x": _X})
    except TpeftError as error:
        return {"built": True, "works": False, "reason": error.got or error.said}
    except Exception as error:  # ONNX Runtime raises unexported classes and RuntimeError alike
        return {"built": True, "works": False, "reason": brief(error)}
    if not np.allclose(answer, _Y, rtol=1e-2):  # TF32 and bfloat16 are precise enough to work
        return {
            "built": True,
            "works": False,
            "reason": f"it computed {answer.ravel().tolist()}, not {_Y.ravel().tolist()}",
        }
    return {"built": True, "works": True, "reason": f"a session ran on {choice.execution.label}"}


def main() -> None:
    """Print the outcome for the provider that the arguments name."""
    print(json.dumps(try_provider(sys.argv[1])), flush=True)


if __name__ == "__main__":
    main()
