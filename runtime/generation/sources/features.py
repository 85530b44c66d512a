"""Features of images: embeddings that a prompt has in the place of its placeholder tokens."""

from __future__ import annotations

import hashlib
from collections import abc
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import onnxruntime

from tpeft_deploy.bundle.decoder import DecoderPorts
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import InputError
from tpeft_deploy.runtime import inputs as requests
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.generation.handle import GenerationRequest
from tpeft_deploy.runtime.generation.sequence import Sequence
from tpeft_deploy.runtime.generation.sources.source import RunSource
from tpeft_deploy.tucker import Array

__all__ = ["FeatureInput", "Features", "Images", "stacked"]


@dataclass(frozen=True, eq=False)
class Features:
    """Features of one prompt.

    Args:
        places: positions of the placeholder tokens, ascending.
        rows: features of each, (placeholders, width).
    """

    places: Array
    rows: Array

    def between(self, start: int, end: int) -> Array | None:
        """Features of the tokens from `start` to before `end`, zeros for others; None where no token has any."""
        first, last = np.searchsorted(self.places, [start, end])
        if first == last:
            return None
        found = np.zeros((end - start, self.rows.shape[1]), self.rows.dtype)
        found[self.places[first:last] - start] = self.rows[first:last]
        return found


def stacked(features: abc.Sequence[Features | None], start: int, end: int) -> Array | None:
    """Features (rows, end - start, width) of the same tokens of several prompts; None where no token has any."""
    found = [None if each is None else each.between(start, end) for each in features]
    some = next((own for own in found if own is not None), None)
    if some is None:
        return None
    return np.stack([np.zeros_like(some) if own is None else own for own in found])


class FeatureInput:
    """Host memory for the features of a run, zeros for rows without any.

    Args:
        name: input of the decoder.
        dtype: dtype of the input.
        rows: number of rows.
        width: size of a feature.
    """

    def __init__(self, name: str, dtype: str, rows: int, width: int) -> None:
        self._name = name
        self._array = np.zeros((rows, 0, width), dtype)
        self._blank = True

    @classmethod
    def of(cls, manifest: Manifest) -> Self | None:
        """Describe the input of a decoder, for no rows; None where it reads no features."""
        ports = manifest.decoder
        own = [port for port in manifest.inputs if ports is not None and port.name == ports.features]
        return cls(own[0].name, own[0].dtype, 0, int(own[0].shape[2])) if own else None

    def bound(self, rows: int) -> FeatureInput:
        """Make the memory of a binding."""
        return FeatureInput(self._name, self._array.dtype.name, rows, self._array.shape[2])

    def bind(self, binding: onnxruntime.IOBinding, chunk: int, features: Array | None) -> None:
        """Bind the features of a run, if others are bound.

        Args:
            binding: binding of a session.
            chunk: number of tokens of each row.
            features: features, (rows, chunk, width); None for rows without any.
        """
        rows, own, width = self._array.shape
        if own == chunk and features is None and self._blank:
            return
        if own != chunk:
            self._array = np.zeros((rows, chunk, width), self._array.dtype)
        self._array[:] = 0 if features is None else features
        self._blank = features is None
        binding.bind_input(self._name, "cpu", 0, self._array.dtype.type, self._array.shape, self._array.ctypes.data)


class Images:
    """Component with the features of images, and what sequences have of them; safe to use from several threads.

    Args:
        ports: ports of the decoder.
        manifest: manifest of the component.
        run: runs the component on a version that is resident.
    """

    def __init__(self, ports: DecoderPorts, manifest: Manifest, run: RunSource) -> None:
        self._placeholder, self._source = ports.placeholder, ports.source
        [self._output] = ports.source_outputs
        self._manifest = manifest
        self._run = run
        shape: Any = next(port.shape for port in manifest.outputs if port.name == self._output)
        self._tokens: int | None = shape[1] if isinstance(shape[1], int) else None

    def prepare(self, request: GenerationRequest, doing: str) -> GenerationRequest:
        """Check the images of a request; returns it with arrays that the component takes, or without inputs.

        Raises:
            InputError: they do not fit the component, or the placeholder tokens of the prompt.
        """
        count = len(self._places(request.prompt))
        ports = {port.name: port.dtype for port in self._manifest.inputs}
        given = {name: _array(doing, name, value, ports.get(name)) for name, value in (request.inputs or {}).items()}
        if all(array.ndim and not len(array) for array in given.values()):
            given = {}
        arrays = requests.check_inputs(self._manifest, given) if given else {}
        images = requests.rows(self._manifest, arrays) if given else 0
        features = images * self._tokens if self._tokens is not None else count  # else the run shows it
        if count != features or bool(count) != bool(images):
            raise self._misfit(doing, images, count, images and features)
        if not images:
            return replace(request, inputs=None)
        return replace(request, inputs=arrays, marks=self._marks(request.prompt, arrays, count // images))

    def compute(self, sequence: Sequence, version: Version) -> None:
        """Give a sequence the features of its images, unless it has them, or reads none of them any more.

        Args:
            sequence: sequence that got a slot.
            version: version of the sequence, acquired.

        Raises:
            InputError: the number of features is not that of the placeholder tokens.
        """
        if sequence.inputs is None:
            return
        places = self._places(sequence.prompt)
        if places[-1] < sequence.cached:
            return
        found = self._run(sequence.inputs, version)[self._output]
        rows = found.reshape(-1, found.shape[-1])
        if len(rows) != len(places):
            raise self._misfit("generate tokens", len(found), len(places), len(rows))
        sequence.features, sequence.inputs = Features(places, rows), None

    def _places(self, prompt: object) -> Array:
        """Positions of the placeholder tokens."""
        return np.flatnonzero(np.asarray(prompt) == self._placeholder)

    def _marks(self, prompt: object, arrays: Mapping[str, Array], each: int) -> tuple[Hashable, ...]:
        """Tokens of a prompt, with the digest of its image in the place of each placeholder."""
        digests = []
        for parts in zip(*(arrays[name] for name in sorted(arrays)), strict=True):
            found = hashlib.sha256()
            for part in parts:
                found.update(f"{part.dtype} {part.shape} ".encode())
                found.update(np.ascontiguousarray(part).data)
            digests.append(found.digest())
        marks: list[Hashable] = np.asarray(prompt).tolist()
        for index, place in enumerate(self._places(prompt)):
            marks[place] = digests[index // each]
        return tuple(marks)

    def _misfit(self, doing: str, images: int, count: int, features: int) -> InputError:
        return InputError(
            doing,
            expected=f"a placeholder token {self._placeholder} for each feature, {features} for {images} images",
            got=f"{count} in the prompt",
            fix="Give the images as inputs, and repeat the placeholder as the processor of the model does.",
        )


def _array(doing: str, name: str, value: object, dtype: str | None) -> Array:
    try:
        return value if isinstance(value, np.ndarray) else np.asarray(value, dtype)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{doing}, input {name!r}", expected="an array", got=f"what numpy makes none of ({str(error)[:120]})"
        ) from error
