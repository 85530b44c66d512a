"""Match the initializers of a foreign graph with the weights of the base.

Four things say so: the initializer's own name, the exporter's metadata on its consumers, their paths, and the values.
Values are required; the others choose between weights of equal values, and must not contradict.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from tpeft_deploy.exporters.bases.foreign import problems
from tpeft_deploy.exporters.bases.foreign.initializer_uses import QUANTISED, Use, renaming, uses_of
from tpeft_deploy.exporters.bases.foreign.known_weights import Known
from tpeft_deploy.exporters.bases.foreign.problems import Problem
from tpeft_deploy.exporters.bases.foreign.quantised_match import find_quantised
from tpeft_deploy.exporters.bases.foreign.unfuse import can_unfuse, row_factors
from tpeft_deploy.exporters.bases.foreign.value_match import Orientation, Values, is_plain, shape_of, stored
from tpeft_deploy.tucker import Array

__all__ = ["Found", "Place", "identify"]

_PARAMETER = re.compile(r"\w+(\.\w+)+$")  # a name that an exporter keeps; what it computes is called otherwise
_PARTS = {
    "Conv": ("weight", "bias"),
    "ConvTranspose": ("weight", "bias"),
    "Gemm": ("weight", "bias"),
    "LayerNormalization": ("weight", "bias"),
    "InstanceNormalization": ("weight", "bias"),
    "GroupNormalization": ("weight", "bias"),
    "BatchNormalization": ("weight", "bias", "running_mean", "running_var"),
    "MatMul": ("weight",),
}


@dataclass(frozen=True, eq=False)
class Place:
    """A use that was identified.

    Args:
        use: place of the weight in the graph.
        name: name of the weight.
        turned: whether the file holds it transposed.
        factors: (O,) what its rows were multiplied by, when a norm was folded into it.
    """

    use: Use
    name: str
    turned: bool
    factors: Array | None = None


@dataclass(eq=False)
class Found:
    """Result of `identify`.

    Args:
        places: every use with a certain weight.
        quantised: every product with a certain quantised weight, and that weight.
        problems: weight -> why an adapter must not change it.
        aliases: name that only the file has for a weight -> the weight's known name.
        untied: those of them that are a further use of the weight, by another module than the known name's.
        rename: from names of the file to names of the base.
    """

    rename: Callable[[str], str]
    places: list[Place] = field(default_factory=list)
    quantised: list[tuple[ir.Node, str]] = field(default_factory=list)
    problems: dict[str, Problem] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class _Evidence:
    """One use and what is said about it: all names are the first ones of their tensors."""

    use: Use
    values: dict[str, Orientation]
    exact: str | None
    claims: dict[str, set[str]]


def identify(graph: ir.Graph, known: Known) -> Found:
    """Identify every use of every floating point initializer, as far as names and values allow."""
    return _Identifier(graph, known).run()


class _Identifier:
    def __init__(self, graph: ir.Graph, known: Known) -> None:
        self.known = known
        self._full = known.arrays is not None
        self.graph = graph
        # Scales and zero points are no weights, and what they belong to is found by other means.
        self.uses = [use for use in uses_of(graph) if use.node.op_type not in QUANTISED]
        paths = {str(use.value.name) for use in self.uses} | {m for use in self.uses for m in use.claims.values()}
        self.found = Found(renaming(paths, known.modules | frozenset(known.shapes)))
        self.by_shape: dict[tuple[int, ...], set[str]] = defaultdict(set)
        for shape, names in known.by_shape.items():
            self.by_shape[shape].update(names)
        if known.arrays is None:  # adapters name their targets only; the file may name others
            for use in self.uses:
                self.by_shape[shape_of(use.value)].add(self.found.rename(str(use.value.name)))
        self._values = Values(known)
        self._holders: dict[str, set[str]] = defaultdict(set)  # weight -> what the modules that use it call it

    def run(self) -> Found:
        evidence = [self._evidence(use) for use in self.uses]
        held = Counter(name for entry in evidence for name in entry.values)
        for entry in evidence:
            if entry.values:
                self._decide(entry, held)
        unfused: set[int] = set()
        for entry in evidence:
            if not entry.values and entry.use.is_kernel and self._unfuse(entry, held):
                unfused.add(id(entry.use.node))
        for entry in evidence:
            if not entry.values and id(entry.use.node) not in unfused:
                self._differs(entry)
                self._computed(entry)
        self.found.quantised, obstacles = find_quantised(self.graph, self.known, self.found.rename)
        self.found.problems |= obstacles
        self.found.untied = {
            alias: name for name, names in self._holders.items() if len(names) > 1 for alias in names - {name}
        }
        placed = {place.name for place in self.found.places}
        for node, name in self.found.quantised:
            if name in placed:  # tied, and quantised at one of its uses only
                self.found.problems[name] = problems.quantised(node.op_type, str(node.name), full=True)
        return self.found

    def _evidence(self, use: Use) -> _Evidence:
        exact = self.found.rename(str(use.value.name))
        named = any(exact in names for names in self.by_shape.values()) if exact not in self.known.shapes else True
        claims = {}
        for label, module in use.claims.items():
            claims[label] = self._under(self.found.rename(module), use)
        return _Evidence(use, self._values.of(use), self._first(exact) if named else None, claims)

    def _first(self, name: str) -> str:
        return self.known.first.get(name, name)

    def _under(self, module: str, use: Use) -> set[str]:
        """The weights of a module, and of those inside it, that have the shape for a use."""
        shape = shape_of(use.value)
        names = self.by_shape.get(shape, set()) | (self.by_shape.get(shape[::-1], set()) if use.turnable else set())
        return {self._first(name) for name in names if not module or name.startswith(f"{module}.")}

    def _decide(self, entry: _Evidence, held: Mapping[str, int]) -> None:
        """Choose among the weights that have an initializer's values."""
        picks, exact = set(entry.values), entry.exact
        claimed = {label: names for label, names in entry.claims.items() if names}
        if self._another(entry):
            return
        contradicted = any(not picks & names for names in claimed.values())
        if contradicted or (exact in self.known.digests and exact not in picks):
            only = {name for names in claimed.values() if len(names) == 1 for name in names}
            self._disagree(picks | only | ({exact} if exact is not None else set()), entry)
            return
        for names in claimed.values():
            picks &= names
        picks = self._by_part(picks, entry.use) or picks
        if len(picks) > 1 and exact in picks and self._stand_apart(picks):
            picks = {exact}
        if len(picks) > 1:
            self._ambiguous(picks, entry.use, "several weights have these values")
            return
        (name,) = picks
        if not self._full and not claimed and held[name] > 1:
            self._ambiguous(picks, entry.use, "several places hold these values: tied weights, or equal ones")
            return
        layout = entry.values[name]
        if layout == "either" and exact != name:
            self._ambiguous(picks, entry.use, "the weight reads the same transposed")
            return
        if self._full and not claimed:
            self._alias(name, entry.use)
        if self._full:
            self._holders[name].update([name] if claimed else self._modules_of(entry.use))
        self.found.places.append(Place(entry.use, name, layout == "turned"))

    def _another(self, entry: _Evidence) -> bool:
        """Whether this is a weight that no adapter changes, which only happens to be equal to one that some do."""
        exact = entry.exact
        if self._full or exact is None or exact in self.known.shapes:
            return False
        claimed = [names for names in entry.claims.values() if names]
        return bool(claimed) and all(exact in names for names in claimed) and self._stand_apart(entry.values)

    def _by_part(self, picks: set[str], use: Use) -> set[str]:
        parts = _PARTS.get(use.node.op_type, ())
        if not 1 <= use.index <= len(parts):
            return set()
        return {name for name in picks if name.rpartition(".")[2] == parts[use.index - 1]}

    def _stand_apart(self, picks: Iterable[str]) -> bool:
        """Whether each of some weights of equal values has an initializer of the same name: nothing was merged."""
        named = {self._first(self.found.rename(name)) for name in self.graph.initializers}
        return all(name in named for name in picks)

    def _modules_of(self, use: Use) -> list[str]:
        """Names of the weight of a module without known weights, by the evidence for the module that a use is in."""
        modules = [module for module in map(self.found.rename, use.claims.values()) if module and use.index <= 1]
        return [f"{module}.weight" for module in modules if f"{module}.weight" not in self.known.shapes]

    def _alias(self, name: str, use: Use) -> None:
        """A module that uses another's weight and has none: a name that checkpoints leave out."""
        for alias in self._modules_of(use):
            self._name(alias, name, use)
        own = self.found.rename(str(use.value.name))
        if own not in self.known.shapes and own.rpartition(".")[0]:
            self._name(own, name, use)

    def _name(self, alias: str, name: str, use: Use) -> None:
        if self.found.aliases.setdefault(alias, name) != name:
            self._ambiguous({alias}, use, f"it uses {name} under a name that {self.found.aliases[alias]} has too")

    def _unfuse(self, entry: _Evidence, held: Mapping[str, int]) -> bool:
        """Whether the values are a weight's with a norm folded in; the names choose the weights that are tried."""
        arrays, use = self.known.arrays, entry.use
        if arrays is None or not can_unfuse(use.node):
            return False
        claimed = {name for names in entry.claims.values() for name in names}
        named = {entry.exact} if entry.exact in self.known.shapes else claimed
        names = named or {self._first(n) for n in self._under("", use) if not held[n]}
        fits: list[Place] = []
        for name in sorted(filter(None, names)):
            for turned in (False, True) if use.turnable else (False,):
                have, weight = stored(use.value), arrays[name]
                if (have.shape[::-1] if turned else have.shape) != weight.shape or weight.dtype.kind != "f":
                    continue
                factors = row_factors(have, weight, use.node, turned=turned)
                fits += [Place(use, name, turned, factors)] if factors is not None else []
        if any(not {place.name for place in fits} & names for names in entry.claims.values() if names and fits):
            self._disagree({place.name for place in fits}, entry)
            return True
        if len(fits) > 1:
            self._ambiguous({place.name for place in fits}, use, "several weights are multiples of these values")
            return True
        self.found.places += fits
        return bool(fits)

    def _differs(self, entry: _Evidence) -> None:
        """Note that a weight's name stands beside other values than the weight has."""
        use, exact = entry.use, entry.exact
        names = {exact} if exact is not None and exact in self.known.shapes else set()
        if not names and use.is_kernel:
            claimed = {name for found in entry.claims.values() for name in found if name in self.known.shapes}
            placed = {place.name for place in self.found.places}
            names = claimed if len(claimed) == 1 and not claimed & placed else set()
        for name in names & set(self.known.digests):
            digest = None if self._full else self.known.digests[name]
            self.found.problems.setdefault(name, problems.differs(use, digest))

    def _computed(self, entry: _Evidence) -> None:
        """Distrust a constant of unknown origin in or beside a weight's own module: it may be the weight's product.

        Where an optimiser has computed one of several uses of a weight, a change would reach only the others.
        """
        use, shape = entry.use, shape_of(entry.use.value)
        if len(shape) < 2 or _PARAMETER.match(str(use.value.name)) or entry.exact in self.known.shapes:
            return
        modules, sizes = set(map(self.found.rename, use.claims.values())), _products(shape)
        # Adapters record the weights of the layers that they change, and no others.
        beside = self._full or not use.is_kernel
        for name, own in self.known.shapes.items():
            # A product has the weight's rows along an axis, or heads and their sizes along two; or q, k or v of three.
            fits = len(own) > 1 and (own[0] in sizes or own[0] / 3 in sizes)
            if fits and _near(name.rpartition(".")[0], modules, beside=beside) and not is_plain(use.value):
                self.found.problems.setdefault(self._first(name), problems.computed(use, full=self._full))

    def _disagree(self, names: set[str], entry: _Evidence) -> None:
        problem = problems.disagree(entry.use, entry.claims, entry.values, full=self._full)
        self.found.problems |= dict.fromkeys(names, problem)

    def _ambiguous(self, names: set[str], use: Use, why: str) -> None:
        self.found.problems |= dict.fromkeys(names, problems.ambiguous(use, names, why, full=self._full))


def _products(shape: tuple[int, ...]) -> set[float]:
    """The products of every choice of a shape's axes."""
    found = {1.0}
    for size in shape:
        found |= {size * other for other in found}
    return found - {1.0}


def _near(module: str, others: Iterable[str], *, beside: bool) -> bool:
    """Whether a module's results may be used in others: itself, two levels up, and what is beside it."""
    parent = module.rpartition(".")[0]
    around = {module, parent, parent.rpartition(".")[0] if parent else parent}
    return any(other in around or (beside and parent and other.startswith(f"{parent}.")) for other in others)
