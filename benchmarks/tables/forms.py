"""What the forms of a base cost to run, against the base in a default session of ONNX Runtime."""

from __future__ import annotations

import gc
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import tpeft_deploy
from benchmarks import export_time
from benchmarks.export import Logits, adapter_for, convnext, vit
from benchmarks.runtime import WORDS, Encoder, as_by_default, encoder
from benchmarks.tables.limits import bandwidth_case, gemm_case
from benchmarks.tables.table import Figure, Row, Settings, Table, race
from tpeft_deploy import Bundle, Runtime, export_bundle
from tpeft_deploy.runtime.bench.cases import PlainSessions, batch, fold_copy, served
from tpeft_deploy.runtime.bench.measure import Case, interleave, spread
from tpeft_deploy.runtime.bench.results import Spread
from tpeft_deploy.runtime.sessions.providers import choose
from tpeft_deploy.tucker import Array

__all__ = ["DEFAULT", "FULL", "Config", "bundle_of", "measure"]

ADAPTERS, TOKENS = 8, 32
LIMIT = 1e-4  # of equal answers, relative to the largest
BEHIND = 1.05
# Form as a column shows it -> the case of `served`; with one row, N adapters take turns.
FORMS = {
    "folded": "folded",
    "factored": "factored",
    "banked, 1 adapter": "banked",
    f"banked, {ADAPTERS} adapters": "mixed",
}
COLUMNS = (*(f"{form}, ratio" for form in FORMS), "plain base, ms", "plain base, share of bound", "largest difference")
TEXT = f"""Time of a run over that of the base in a default session of ONNX Runtime, on the CPU, in float32, with
random weights. A folded model has one adapter merged; factored is the base with branches, one adapter bound to them;
banked selects adapters from a bank of {ADAPTERS}: one for all rows, or another one for each row (in turns over single
rows). Texts have {TOKENS} tokens, images 224 x 224 pixels.

Base, folded, factored and banked outputs were compared before: "largest difference" is relative to the largest output
and at most {LIMIT:g}, and an adapter changes the base's outputs by at least ten times that. The bound of a run is the
larger of two times: its floating-point operations at the rate of products of the table of limits, and reading its
weights at the memory bandwidth; both rates were measured first, in the same process. "Share of bound" is the bound
over the time; weights that stay in the processor's cache are read faster than from memory."""

Made = tuple[nn.Module, dict[str, torch.Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Config:
    """A base with adapters on some layers, and the batch sizes to run."""

    model: str
    scope: str
    rank: int
    rows: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.model}, {self.scope}, rank {self.rank}"


def _texts(words: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, words, (2, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _encoder() -> Made:
    module, _, free = encoder()
    return module, _texts(WORDS), free


def _deberta() -> Made:
    model, inputs, free, _ = export_time.deberta()
    del inputs
    return Encoder(model).eval(), _texts(128_000), free


def _images(module: nn.Module) -> Made:
    assert isinstance(module, Logits)
    return module, {"pixel_values": torch.randn(2, 3, 224, 224)}, {"pixel_values": {0: "batch"}}


MODELS: dict[str, Callable[[], Made]] = {
    "encoder 6 x 384": _encoder,
    "ViT-base": lambda: _images(vit()),
    "ConvNeXtV2-tiny": lambda: _images(convnext()),
    "DeBERTaV3-base": _deberta,
}
SCOPES: dict[str, Callable[[str, nn.Module], bool]] = {
    "attention": lambda name, layer: "attention" in name and isinstance(layer, nn.Linear),
    "linears": lambda _, layer: isinstance(layer, nn.Linear),
    "convs": lambda _, layer: isinstance(layer, nn.Conv2d),
}
DEFAULT = (
    Config("encoder 6 x 384", "linears", 8, (1, 8, 32)),
    Config("encoder 6 x 384", "linears", 4, (8,)),
    Config("encoder 6 x 384", "linears", 32, (8,)),
    Config("encoder 6 x 384", "attention", 8, (8,)),
    Config("ViT-base", "linears", 8, (1,)),
    Config("ConvNeXtV2-tiny", "convs", 8, (1,)),
    Config("DeBERTaV3-base", "attention", 8, (1,)),
)
_WITHOUT = {("encoder 6 x 384", "convs"), ("DeBERTaV3-base", "convs"), ("ConvNeXtV2-tiny", "attention")}
FULL = tuple(
    Config(model, scope, rank, (1, 8, 32))
    for model, scope, rank in product(MODELS, SCOPES, (4, 8, 32))
    if (model, scope) not in _WITHOUT
)


def measure(settings: Settings) -> Table:
    """Measure the forms of each configuration.

    Raises:
        SystemExit: forms of one adapter give different answers.
    """
    torch.set_num_threads(settings.threads)
    rates = _rates(settings)
    rows: list[Row] = []
    losses: dict[str, str] = {}
    for config in FULL if settings.full else DEFAULT:
        with bundle_of(config, settings.cache) as (bundle, facts):
            for count in config.rows:
                name = f"{config.name}, {count} row{'s' if count > 1 else ''}"
                figures = _compare(bundle, count, settings)
                figures["plain base, share of bound"] = _share(figures["plain base, ms"], facts, count, rates)
                rows.append(Row(name, figures))
                if reason := _behind(figures, facts):
                    losses[name] = reason
    return Table("forms", "Forms of a base", TEXT, COLUMNS, tuple(rows), losses)


def _rates(settings: Settings) -> tuple[float, float]:
    """Floating-point operations and bytes in a second."""
    triad, moved = bandwidth_case(settings.threads)
    session, _, operations = gemm_case(settings.threads)
    times = interleave({"triad": triad, "session": session}, min(2.0, settings.seconds))
    return operations / spread(times["session"]).median, moved / spread(times["triad"]).median


def _share(ms: Figure, facts: Mapping[str, float], rows: int, rates: tuple[float, float]) -> float:
    assert isinstance(ms, Spread)
    bound = max(facts["operations of a row"] * rows / rates[0], facts["bytes of the weights"] / rates[1])
    return bound / (ms.median / 1e3)


def _compare(bundle: Bundle, rows: int, settings: Settings) -> dict[str, Figure]:
    plain = PlainSessions(bundle, choose("cpu"), settings.threads)
    tasks = list(bundle.tasks)
    with Runtime(bundle.path, provider="cpu", threads=settings.threads) as runtime:
        folded = fold_copy(bundle, runtime)
        if not isinstance(folded, str):
            raise SystemExit(f"fold a task of {bundle.manifest.name}: expected a session, got {folded}")
        cases = served(bundle, runtime, plain, tasks, folded, rows)
        difference = _differences(cases, plain, bundle, rows)
        inputs = batch(bundle, rows)
        session = as_by_default(bundle.path / "base.onnx", settings.threads)
        cases["plain"] = lambda: session.run(None, inputs)
        if rows == 1:
            cases["mixed"] = cases["switched"]
        timed = {name: cases[name] for name in ("plain", *FORMS.values())}
        found = race(timed, settings.seconds, "plain")
    figures: dict[str, Figure] = {f"{form}, ratio": found[case]["ratio"] for form, case in FORMS.items()}
    return figures | {"plain base, ms": found["plain"]["ms"], "largest difference": difference}


def _differences(cases: Mapping[str, Case], plain: PlainSessions, bundle: Bundle, rows: int) -> float:
    """Compare the forms of the first adapter, and each row of a mixed batch with the factored form of its adapter.

    Returns:
        The largest difference, relative to the largest output.
    """
    tasks, inputs = list(bundle.tasks), batch(bundle, rows)
    base, one = _logits(cases["plain"]()), _logits(cases["factored"]())
    pairs = [(base, _logits(cases["base"]())), *((one, _logits(cases[name]())) for name in ("folded", "banked"))]
    if rows > 1:
        own = {task: _logits(plain.factored(task, inputs)()) for task in tasks[:rows]}
        wanted = np.stack([own[tasks[row % len(tasks)]][row] for row in range(rows)])
        pairs.append((wanted, _logits(cases["mixed"]())))
    largest = max(_distance(*pair) for pair in pairs)
    if not largest <= LIMIT:
        raise SystemExit(f"compare the forms of {bundle.manifest.name}: expected up to {LIMIT:g}, got {largest:g}")
    if not (changed := _distance(base, one)) >= 10 * LIMIT:
        raise SystemExit(f"compare an adapter with the base: expected at least {10 * LIMIT:g}, got {changed:g}")
    return largest


def _logits(outputs: object) -> Array:
    first: Array = next(iter(outputs.values())) if isinstance(outputs, dict) else outputs[0]  # type: ignore[index]
    return first


def _distance(one: Array, other: Array) -> float:
    return float(np.abs(one - other).max() / np.abs(one).max())


def _behind(figures: Mapping[str, Figure], facts: Mapping[str, float]) -> str:
    """Forms that certainly take longer than the base, with the work that they add; empty if there are none."""
    slower = {form: own for form in FORMS if isinstance(own := figures[f"{form}, ratio"], Spread) and own.low > BEHIND}
    if not slower:
        return ""
    text = "; ".join(f"{form} {own.median:.2f}" for form, own in slower.items())
    reason = f"branches at {facts['targets']:.0f} layers, each of two or more further products and a sum"
    if "folded" in slower:
        reason += "; a folded model has the base's operators, and the runtime's checks for each call"
    return f"{text}: {reason}"


@contextmanager
def bundle_of(config: Config, cache: Path) -> Iterator[tuple[Bundle, dict[str, float]]]:
    """The bundle of a configuration and facts about its base; those outside of the default are not kept."""
    key = f"{config.name.lower().replace(', ', '-').replace(' ', '-')}-{_version()}"
    keep = any(config.name == own.name for own in DEFAULT)
    with tempfile.TemporaryDirectory(dir=cache) as place:
        folder = (cache if keep else Path(place)) / key
        if not (folder / "facts.json").is_file():
            facts = _export(config, folder)
            (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
            gc.collect()
        yield Bundle.open(folder / "bundle"), json.loads((folder / "facts.json").read_text(encoding="utf-8"))


def _export(config: Config, folder: Path) -> dict[str, float]:
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    module, inputs, free = MODELS[config.model]()
    chosen = SCOPES[config.scope]
    adapters = {f"task-{n}": adapter_for(module, n, config.rank, chosen) for n in range(ADAPTERS)}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**inputs)
    first = dict(list(adapters.items())[:2])
    bundle = export_bundle(
        module,
        first,
        folder / "bundle",
        name=config.name.replace(" ", "-").replace(",", ""),
        max_rank=config.rank,
        example_inputs=inputs,
        dynamic_shapes=free,
    )
    for task in list(adapters)[len(first) :]:  # the export compares each adapter's forms, which takes minutes
        bundle.add(task, adapters[task])
    # Rows of a table of embeddings that a run does not look up are not read.
    kept = [own for own in module.modules() if not isinstance(own, nn.Embedding)]
    weights = {id(own): own.nbytes for part in kept for own in part.parameters(recurse=False)}
    return {
        "operations of a row": counter.get_total_flops() / len(next(iter(inputs.values()))),
        "bytes of the weights": float(sum(weights.values())),
        "targets": float(len(bundle.manifest.targets)),
    }


def _version() -> str:
    """A digest of the code that exports, so that bundles of other code are not measured."""
    package = Path(tpeft_deploy.__file__).parent
    digest = hashlib.sha256(f"{ADAPTERS} adapters, {TOKENS} tokens".encode())
    for folder in (package / "exporters", package / "bundle"):
        for file in sorted(folder.resolve().rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
