"""A session of a graph without banks: a base as it is, or with other weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from tpeft_deploy.errors import RunError
from tpeft_deploy.runtime import device_lock
from tpeft_deploy.runtime.sessions import onnx_bytes
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.onnx_bytes import Declared
from tpeft_deploy.runtime.sessions.providers import bind
from tpeft_deploy.tucker import Array

__all__ = ["Plain"]

_BFLOAT16 = 16
# ONNX's numbers of dtypes; numpy does not have bfloat16: its bits are taken.
_DTYPES = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64", _BFLOAT16: "uint16"}


class Plain:
    """A session of a graph without banks; safe to use from several threads.

    Args:
        model: ONNX file with its weights in an external file.
        sessions: makes the session.
        initializers: name of an external initializer -> array in its place, of another shape where the graph allows
            it; bfloat16 as uint16.

    Raises:
        RunError: an initializer is not one of the model's, or has another dtype.
        ProviderUnavailable: as `open_session`.
    """

    def __init__(
        self, model: Path, sessions: SessionFactory, *, initializers: Mapping[str, Array] | None = None
    ) -> None:
        content = model.read_bytes() if initializers else b""
        found = onnx_bytes.declared(content)
        # ONNX Runtime reads from these arrays without holding on to them.
        self._kept = {name: np.asarray(a, order="C") for name, a in (initializers or {}).items()}
        self._values = {n: _value(a, _check(model, n, a, found.get(n))) for n, a in self._kept.items()}
        shapes = {name: a.shape for name, a in self._kept.items() if a.shape != found[name].shape}
        resized = onnx_bytes.resized(content, shapes) if shapes else None
        self._session = sessions.open(model, content=resized, initializers=self._values)
        self._device = sessions.device
        self._place = device_lock.place(sessions.device)
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._bindings: deque[onnxruntime.IOBinding] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that stand in place of the model's."""
        return sum(array.nbytes for array in self._kept.values())

    def run(self, inputs: Mapping[str, Array], options: onnxruntime.RunOptions | None = None) -> dict[str, Array]:
        """Run a batch.

        Args:
            inputs: contiguous arrays by input name.
            options: options of this run; its `terminate` stops the run.

        Returns:
            Output name -> new array.
        """
        if self._device == "cpu":  # where IO binding copies outputs once more
            return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs), options), strict=True))
        with device_lock.using(self._device):
            return self._run_bound(inputs, options)

    def _run_bound(self, inputs: Mapping[str, Array], options: onnxruntime.RunOptions | None) -> dict[str, Array]:
        try:
            binding = self._bindings.pop()
        except IndexError:
            binding = bind(self._session)
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        binding.clear_binding_outputs()  # else the last run's buffers would be written again, at their old shapes
        for name in self._outputs:
            binding.bind_output(name, *self._place)
        self._session.run_with_iobinding(binding, options)
        outputs = dict(zip(self._outputs, binding.copy_outputs_to_cpu(), strict=True))
        self._bindings.append(binding)
        return outputs


def _check(model: Path, name: str, array: Array, own: Declared | None) -> Declared:
    doing = f"open {model.name} with another {name!r}"
    if own is None or not own.external:
        raise RunError(
            doing, expected="a weight that the graph reads from weights.data", got="none" if own is None else "another"
        )
    dtype = _DTYPES.get(own.data_type, "one that can be replaced")
    if array.dtype.name != dtype:
        raise RunError(doing, expected=dtype, got=array.dtype)
    if len(own.shape) != array.ndim:
        raise RunError(doing, expected=f"{len(own.shape)} axes", got=f"shape {array.shape}")
    return own


def _value(array: Array, own: Declared) -> onnxruntime.OrtValue:
    if own.data_type == _BFLOAT16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
