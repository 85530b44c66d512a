"""The component that computes what a decoder reads beside tokens: checks of the inputs, and runs for one sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.bundle.manifest import Manifest, Port
from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime import inputs as requests
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.generation.handle import GenerationRequest
from tpeft_deploy.tucker import Array

__all__ = ["SourceEncoder", "digest"]

_MASK = "attention_mask"  # of encoders of text; one sequence has nothing to mask

RunSource = Callable[[Mapping[str, Array], Version], Mapping[str, Array]]


class SourceEncoder:
    """Source component of a decoder; safe to use from several threads.

    Args:
        ports: ports of the decoder.
        manifest: manifest of the component.
        run: runs the component on a version that is resident.
        size: positions of a slot's memory.
    """

    def __init__(self, ports: DecoderPorts, manifest: Manifest, run: RunSource, size: int) -> None:
        self._ports = ports
        self._manifest = manifest
        self._run = run
        self._size = size

    def prepare(self, request: GenerationRequest, doing: str) -> GenerationRequest:
        """Check the inputs of a request; returns it with arrays that the component takes, and with a prompt.

        Raises:
            InputError: they do not fit the component, or the memory.
        """
        given = request.inputs
        if given is None:
            expected = f"inputs of component {self._ports.source!r}: {', '.join(self._names)}"
            raise InputError(doing, expected=expected, got="none", fix="Give inputs={...} for each prompt.")
        if not len(request.prompt) and self._ports.start is not None:
            request = replace(request, prompt=(self._ports.start,))
        return replace(request, inputs=self._checked(given, doing))

    def compute(self, inputs: Mapping[str, Array], version: Version) -> list[Array]:
        """Run the component for one sequence.

        Args:
            inputs: inputs that `prepare` returned.
            version: version of the sequence, acquired.

        Returns:
            The outputs in the order of the decoder's ports, without the batch axis.
        """
        outputs = self._run(inputs, version)
        return [outputs[name][0] for name in self._ports.source_outputs]

    @property
    def _names(self) -> list[str]:
        """Inputs that a caller has to give."""
        return [port.name for port in self._manifest.inputs if port.name != _MASK]

    def _checked(self, given: Mapping[str, object], doing: str) -> dict[str, Array]:
        ports = {port.name: port for port in self._manifest.inputs}
        found = {name: _row(ports[name], value, doing) if name in ports else value for name, value in given.items()}
        if _MASK in ports and _MASK not in found:
            first: Any = found.get(self._names[0])
            found[_MASK] = np.ones(np.shape(first)[:2], ports[_MASK].dtype)
        arrays = requests.check_inputs(self._manifest, found)
        if _MASK in arrays and not arrays[_MASK].all():
            raise InputError(doing, expected=f"input {_MASK!r} of ones", got="zeros", fix="Leave the padding out.")
        length = self._length(arrays)
        if length is not None and length > self._size:
            raise InputError(
                doing,
                expected=f"a source of at most {self._size} positions",
                got=length,
                fix="Shorten it, or give the runtime a larger max_source.",
            )
        return arrays

    def _length(self, arrays: Mapping[str, Array]) -> int | None:
        """Positions of memory that inputs make; None where only the run shows it."""
        axes = {
            axis: size
            for port in self._manifest.inputs
            for axis, size in zip(port.shape, arrays[port.name].shape, strict=True)
        }
        first = next(port for port in self._manifest.outputs if port.name == self._ports.source_outputs[0])
        axis = first.shape[2]
        return axes.get(axis) if isinstance(axis, str) else axis


def digest(inputs: Mapping[str, object] | None) -> bytes | None:
    """Identify inputs by their names, types, shapes and values; None for none."""
    if inputs is None:
        return None
    found = hashlib.sha256()
    for name, value in sorted(inputs.items()):
        array = np.ascontiguousarray(value)
        found.update(f"{name} {array.dtype} {array.shape} ".encode())
        found.update(array.data)
    return found.digest()


def _row(port: Port, value: object, doing: str) -> Array:
    """An input of one sequence, as a batch of one row."""
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value, port.dtype)
    except (ValueError, TypeError) as error:
        got = f"what numpy makes none of ({str(error)[:120]})"
        raise InputError(f"{doing}, input {port.name!r}", expected=f"an array of {port.dtype}", got=got) from error
    if array.ndim != len(port.shape) - 1:
        expected = f"shape [{', '.join(map(str, port.shape[1:]))}]"
        raise InputError(f"{doing}, input {port.name!r}", expected=expected, got=list(array.shape))
    return array[None]
