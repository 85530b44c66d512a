"""An ONNX file that somebody else exported as a base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir
import onnxruntime

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import BaseMismatch, NotEquivalent, TpeftError, UnsupportedBase, UnsupportedTarget
from tpeft_deploy.exporters.bases.foreign.examples import checked_inputs, made_inputs
from tpeft_deploy.exporters.bases.foreign.identify import Found, identify
from tpeft_deploy.exporters.bases.foreign.initializer_uses import class_names
from tpeft_deploy.exporters.bases.foreign.known_weights import Known, of_adapters
from tpeft_deploy.exporters.bases.foreign.normalise import normalise
from tpeft_deploy.exporters.bases.foreign.open_model import open_model
from tpeft_deploy.exporters.bases.foreign.problems import GIVE_WEIGHTS
from tpeft_deploy.exporters.graph.merged_weights import replace_weights
from tpeft_deploy.exporters.oracle import bfloat16, compare
from tpeft_deploy.exporters.oracle.base import Base, Inputs, Outputs
from tpeft_deploy.exporters.oracle.bfloat16 import HALVES, widened
from tpeft_deploy.exporters.oracle.limits import limit_of
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.formats.read.base_view import Lazy
from tpeft_deploy.formats.read.module import BaseView
from tpeft_deploy.tucker import Array

__all__ = ["OnnxBase"]


@dataclass(frozen=True, eq=False)
class _Normal:
    """The file's graph as a raw export would be, and how its weights were found."""

    model: ir.Model
    found: Found
    proved: frozenset[str]
    aliases: Mapping[str, str]


class OnnxBase(Base):
    """An ONNX file as a base: its weights found by name and value, and itself run with merged weights as the oracle.

    Args:
        path: the file.
        inputs: example inputs by name, arrays or tensors; None makes some of the graph's types and sizes, which a
            model that asks more of its inputs (ids of a range, image sizes) may not take.
        known: its original weights; None leaves them to what adapters recorded, see `knowing`.

    Raises:
        UnsupportedBase: the file is no model that can be a base, or the inputs do not fit it.
    """

    def __init__(self, path: Path, inputs: Mapping[str, object] | None, known: Known | None) -> None:
        graph = open_model(path).graph
        name = path.name
        super().__init__(name, made_inputs(name, graph) if inputs is None else checked_inputs(name, graph, inputs))
        self.path = path
        self._known = known
        self._given = inputs
        self._last: tuple[Adapter | None, onnxruntime.InferenceSession] | None = None
        self._batched = any(bool(v.shape) and isinstance(v.shape[0], ir.SymbolicDim) for v in graph.inputs if v.shape)

    @property
    def weights(self) -> Mapping[str, Array]:
        """Every weight by every name: those in the graph in its dtype, then those that it does not use."""
        graph = self._normal.model.graph
        own = {
            name: value.const_value
            for name, value in graph.initializers.items()
            if value.const_value is not None and value.const_value.dtype.is_floating_point()
        }
        others = self._known.arrays if self._known is not None and self._known.arrays is not None else {}
        first = self._normal.aliases
        names = dict.fromkeys([*own, *first, *others])

        def read(name: str) -> Array:
            held = own.get(first.get(name, name))
            return held.numpy() if held is not None else others[name]

        return Lazy(names, read)

    @property
    def aliases(self) -> Mapping[str, str]:
        """Every name of a weight -> one name of the same tensor."""
        return {name: self._normal.aliases.get(name, name) for name in self.weights}

    @property
    def view(self) -> BaseView | None:
        """Names and values, or None without the original weights: what nobody proved must not be read."""
        if self._known is None or self._known.arrays is None:
            return None
        kinds = dict(self._known.kinds) or {
            self._normal.found.rename(path): kind for path, kind in class_names(self._normal.model.graph).items()
        }
        return BaseView(self.name, self.weights, kinds)

    @property
    def batched(self) -> bool:
        """Whether some input's first axis is free."""
        return self._batched

    def graph(self) -> ir.Model:
        """The normalised graph."""
        return self._normal.model.clone()

    def knowing(self, adapters: Iterable[Adapter]) -> Base:
        """Without the original weights, this base with its weights found by the digests that adapters recorded.

        Raises:
            UnsupportedBase: there is nothing that says what the weights are.
        """
        if self._known is not None and self._known.arrays is not None:
            return self
        known = of_adapters(adapters)
        if not known.shapes:
            raise UnsupportedBase(
                f"find the weights of {self.name}",
                expected="the original weights, or adapters that recorded digests of them",
                got="neither",
                fix=GIVE_WEIGHTS,
            )
        return OnnxBase(self.path, self._given, known)

    def proves(self, name: str) -> bool:
        """Whether a weight was found by its values."""
        return self._normal.aliases.get(name, name) in self._normal.proved

    def check(self, adapter: Adapter) -> None:
        """Refuse an adapter unless every weight that it changes was found by name and value, and fits."""
        for name in dict.fromkeys([*adapter.deltas, *adapter.gains, *adapter.served_overrides]):
            error = self._objection(adapter, name)
            if error is not None:
                raise error
        super().check(adapter)

    def reference(self, adapter: Adapter | None, inputs: Inputs, names: Sequence[str]) -> Outputs:
        """Run the normalised graph with merged tensors in place of the base's, nothing optimised."""
        if self._last is None or self._last[0] is not adapter:
            self._last = None
            model = self._unproved.model.clone()
            if adapter is not None:
                replace_weights(self, model, adapter)
            self._last = adapter, _session(model)
        outputs = compare.run(self._last[1], inputs, {})
        return {name: outputs[name] for name in names}

    def in_both(self, inputs: Inputs, names: Sequence[str]) -> tuple[Outputs, Outputs]:
        """Run the normalised graph as it is, and as a copy in float32 with the same weights.

        Raises:
            UnsupportedBase: it is in bfloat16, which ONNX Runtime's CPU does not run.
        """
        if bfloat16.holds(self._normal.model.graph):
            raise UnsupportedBase(f"run {self.name} in 16 bits", problem="ONNX Runtime's CPU does not run bfloat16")
        model = self._normal.model.clone()
        bfloat16.upcast(model, HALVES)
        outputs = compare.run(_session(model), {name: widened(array) for name, array in inputs.items()}, {})
        return self.reference(None, inputs, names), {name: outputs[name] for name in names}

    def _objection(self, adapter: Adapter, name: str) -> TpeftError | None:
        doing = f"fit {adapter.source} to base {self.name}, weight {name!r}"
        problems = self._normal.found.problems
        problem = problems.get(name) or problems.get(self._normal.aliases.get(name, name))
        if problem is not None:
            kind = BaseMismatch if problem.values_differ else UnsupportedTarget
            return kind(doing, expected=problem.expected, got=problem.got, fix=problem.fix)
        if self.proves(name):
            return None
        if self._known is not None and self._known.arrays is not None:
            if name not in self._known.shapes:
                return None  # the base has no such weight, as the check of names will say
            return UnsupportedTarget(
                doing,
                expected="an initializer with its values",
                got="none: the graph does not use it, or an optimiser has computed it into something else",
                fix="Export the file with optimize=False (or without constant folding), or give the module itself.",
            )
        if name in adapter.base_digests:
            return BaseMismatch(
                doing,
                expected=f"an initializer of digest {adapter.base_digests[name][:12]}..., as the adapter recorded",
                got="none",
                fix=f"It may be fused with a norm, or be of another base. {GIVE_WEIGHTS}",
            )
        return UnsupportedTarget(
            doing,
            expected="evidence by value of which initializer holds it",
            got="neither the original weights nor a digest that the adapter recorded",
            fix=GIVE_WEIGHTS,
        )

    @cached_property
    def _unproved(self) -> _Normal:
        known = self._known or of_adapters([])
        model = open_model(self.path)
        found = identify(model.graph, known)
        if found.untied:  # checkpoints leave out all but one name of a tied weight
            known = known.with_names(found.untied)
            found = identify(model.graph, known)
        proved = normalise(model, found, known)
        return _Normal(model, found, frozenset(proved), {**found.aliases, **known.first})

    @cached_property
    def _normal(self) -> _Normal:
        """The normalised graph, compared with the file on the example inputs and at another shape."""
        session, subject = _plain(self.path), Subject(self, self._unproved.model.graph)
        self._try_inputs(session)
        limit = limit_of(subject.graph)
        for sizes in subject.shapes:
            expected = compare.run(session, subject.inputs(sizes), {})
            got = subject.reference(None, sizes)
            for (name, own), other in zip(got.items(), expected.values(), strict=True):
                error = compare.relative_error(own, other) if own.shape == other.shape else float("inf")
                if not error <= limit:
                    raise NotEquivalent(
                        f"bring {self.name} to the form that branches need",
                        expected=f"output {name!r} as before, to {limit:g}",
                        got=f"{error:.2e}",
                        fix="Nothing was written; please report the model.",
                    )
        return self._unproved

    def _try_inputs(self, session: onnxruntime.InferenceSession) -> None:
        try:
            compare.run(session, self.inputs, {})
        except NotEquivalent as error:
            raise UnsupportedBase(
                f"run {self.name} itself on its example inputs",
                problem=f"ONNX Runtime fails ({str(error.__cause__).splitlines()[0][:300]})",
                fix="Give a file that runs, and example inputs that it takes (example_inputs=, --inputs FILE.npz).",
            ) from error


def _session(model: ir.Model) -> onnxruntime.InferenceSession:
    with TemporaryDirectory() as place:
        file = Path(place) / "reference.onnx"
        ir.save(model, file, external_data="reference.data")
        return _plain(file)


def _plain(file: Path) -> onnxruntime.InferenceSession:
    try:
        return compare.open_session(file, optimized=False)
    except NotEquivalent as error:
        raise UnsupportedBase(f"load base {file.name}", problem=error.problem) from error
