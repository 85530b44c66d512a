"""A bundle's own base.onnx as a base: its oracle is that graph with merged tensors in place of its initializers.

Neither a branch nor ONNX Runtime's optimiser has a part in the reference, so it is another way to the same numbers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir
import onnxruntime

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.exporters.graph.merged_weights import replace_weights
from tpeft_deploy.exporters.oracle import bfloat16, compare
from tpeft_deploy.exporters.oracle.base import Base, Inputs, Outputs
from tpeft_deploy.exporters.oracle.bfloat16 import HALVES, widened
from tpeft_deploy.ties import Ties
from tpeft_deploy.tucker import Array

__all__ = ["BundleBase"]

_BYTES = 1 << 30  # of weights in references that are kept open; one is kept however large it is
_MOST = 16


class BundleBase(Base):
    """The base of a bundle, without the model it was exported from.

    Args:
        bundle: opened, its files checked.

    Raises:
        IntegrityError: its example inputs cannot be read.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(f"of bundle {bundle.manifest.name}", bundle.example())
        self.decoder = bundle.manifest.decoder
        self._bundle = bundle
        self._room = max(1, min(_MOST, _BYTES // max(bundle.manifest.weight_bytes, 1)))
        self._sessions: OrderedDict[Adapter | None, onnxruntime.InferenceSession] = OrderedDict()

    @property
    def weights(self) -> Mapping[str, Array]:
        """Every weight by every name it has, read from weights.data on access."""
        return self._bundle.base_view.weights

    @property
    def aliases(self) -> dict[str, str]:
        """Every name of a weight -> the name it is stored under."""
        return dict(self._bundle.manifest.stored)

    @property
    def ties(self) -> Ties:
        """Ties that the manifest states."""
        return self._bundle.manifest.ties

    @property
    def view(self) -> object:
        """Names and values, for readers of adapters."""
        return self._bundle.base_view

    @property
    def batched(self) -> bool:
        """Whether there is a batch: always, as a bundle without one is not exported."""
        return self._bundle.manifest.batch_axis is not None

    def graph(self) -> ir.Model:
        """base.onnx, which is optimised already: its inputs, outputs and initializers are those of the raw graph."""
        return ir.load(self._bundle.path / "base.onnx")

    def reference(self, adapter: Adapter | None, inputs: Inputs, names: Sequence[str]) -> Outputs:
        """Run base.onnx with the merged tensors in place of the base's; a 16-bit one in float32."""
        outputs = compare.run(self._session(adapter), {name: widened(array) for name, array in inputs.items()}, {})
        return {name: outputs[name] for name in names}

    def _session(self, adapter: Adapter | None) -> onnxruntime.InferenceSession:
        if adapter not in self._sessions:
            while len(self._sessions) >= self._room:
                self._sessions.popitem(last=False)
            self._sessions[adapter] = self._open(adapter)
        self._sessions.move_to_end(adapter)
        return self._sessions[adapter]

    def _open(self, adapter: Adapter | None) -> onnxruntime.InferenceSession:
        model = self.graph()
        # Its own rounding, at every layer, is no part of what a form is measured by.
        bfloat16.upcast(model, HALVES)
        if adapter is not None:
            replace_weights(self, model, adapter)
        with TemporaryDirectory(prefix="tpeft-reference-") as place:
            file = Path(place) / "merged.onnx"
            ir.save(model, file, external_data="merged.data")
            return compare.open_session(file, optimized=False)
