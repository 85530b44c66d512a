"""Asks NVIDIA's driver and the libraries of CUDA for what they are, and prints JSON objects.

Run as a child process: a driver that does not fit its kernel module may crash or hang.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def ask_driver() -> dict[str, Any]:
    """Return `cuda`, the newest version that the driver supports; `devices` by name; and `reason` if it has none."""
    found: dict[str, Any] = {"cuda": None, "devices": [], "reason": None}
    try:
        driver = ctypes.CDLL(_DRIVER)
        code = driver.cuInit(0)
    except (OSError, AttributeError) as error:  # the library is missing, or is another one
        return found | {"reason": f"no NVIDIA driver ({error})"}
    if code:
        return found | {"reason": f"the NVIDIA driver does not start (cuInit: error {code})"}
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) == 0 and number.value:
        found["cuda"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
    driver.cuDeviceGetCount(ctypes.byref(number))
    for index in range(number.value):
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        driver.cuDeviceGetName(name, 256, index)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), index)
        found["devices"].append({"name": name.value.decode(errors="replace"), "bytes": memory.value})
    return found if found["devices"] else found | {"reason": "the NVIDIA driver has no device"}


def load(name: str) -> dict[str, Any]:
    """Return `library`, its `path` (None where the system's loader finds it), and `error` if it cannot be loaded."""
    places = _packaged(name)
    found = {"library": name, "path": str(places[0]) if places else None, "version": None, "error": None}
    try:
        loaded = ctypes.CDLL(found["path"] or name)
        return found | {"version": _version(name, loaded)}
    except (OSError, AttributeError) as error:  # it is missing, or is another one
        return found | {"error": str(error)}


def _packaged(name: str) -> list[Path]:
    """Copies in NVIDIA's Python packages, where the runtime loads them from first."""
    found = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (found.submodule_search_locations if found else None) or ()]
    copies = [[*place.glob(f"cu[0-9]*/lib/{name}"), *place.glob(f"cudnn/lib/{name}")] for place in places]
    return [file for group in copies for file in sorted(group)]


def _version(name: str, loaded: ctypes.CDLL) -> str | None:
    if name.startswith("libcudnn."):
        number = int(loaded.cudnnGetVersion())
        return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"
    if name.startswith("libcudart."):
        cuda = ctypes.c_int()
        loaded.cudaRuntimeGetVersion(ctypes.byref(cuda))
        return f"{cuda.value // 1000}.{cuda.value % 1000 // 10}"
    return None


def main() -> None:
    """Print the driver, then the libraries that the arguments name."""
    for name in sys.argv[1:]:
        print(json.dumps(load(name)), flush=True)
    print(json.dumps({"driver": ask_driver()}), flush=True)


if __name__ == "__main__":
    main()
