"""Prometheus metrics of generation: tokens and their times by task, sequences, caches, and adapters for routers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from tpeft_deploy.bundle.directory import BASE_TASK
from tpeft_deploy.runtime.generation.stats import GenerationStats
from tpeft_deploy.runtime.server.telemetry.histograms import Bins, histogram
from tpeft_deploy.runtime.server.telemetry.inference_events import GenerationFigures

__all__ = ["AdapterFigures", "GenerationSeries", "of_adapters", "of_sequences", "of_series"]

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)
_COUNTED = (
    ("steps", "tpeft_decoder_steps", "Steps of the decoder"),
    ("prefilled_tokens", "tpeft_prefilled_tokens", "Tokens of prompts computed, again after a preemption"),
    ("reused_tokens", "tpeft_prefix_hit_tokens", "Tokens of prompts found in the cache of prefixes"),
    ("preempted", "tpeft_preemptions", "How often a sequence lost its slot to another"),
)


class GenerationSeries:
    """Tokens of one task and tenant."""

    __slots__ = ("between", "first", "generated", "prompts")

    def __init__(self) -> None:
        self.prompts = self.generated = 0
        self.first, self.between = Bins(_FIRST), Bins(_BETWEEN)

    def observe(self, figures: GenerationFigures) -> None:
        """Count a request."""
        self.prompts += figures.prompt_tokens
        self.generated += sum(map(len, figures.times))
        for times in figures.times:
            before = figures.arrived
            for at, bins in zip(times, (self.first, *[self.between] * (len(times) - 1)), strict=True):
                bins.observe(at - before)
                before = at


def of_series(series: Mapping[tuple[str, str], GenerationSeries]) -> Iterator[Metric]:
    """Yield the metrics of tasks.

    Args:
        series: tenant and task -> their tokens.
    """
    labels = ("tenant", "task")
    prompts = CounterMetricFamily("tpeft_prompt_tokens", "Tokens of prompts", labels=labels)
    generated = CounterMetricFamily("tpeft_generation_tokens", "Tokens generated", labels=labels)
    for key, own in series.items():
        prompts.add_metric(key, own.prompts)
        generated.add_metric(key, own.generated)
    yield prompts
    yield generated
    first = [(key, own.first) for key, own in series.items()]
    yield histogram("tpeft_time_to_first_token_seconds", "From a request to a sequence's first token", first, labels)
    between = [(key, own.between) for key, own in series.items()]
    yield histogram("tpeft_time_between_tokens_seconds", "From a token to the next", between, labels)


def of_sequences(stats: GenerationStats | None) -> Iterator[Metric]:
    """Yield the metrics of the decoder; None where nothing was generated."""
    running, waiting, slots = (0, 0, 0) if stats is None else (stats.running, stats.waiting, stats.slots)
    yield GaugeMetricFamily("tpeft_running_sequences", "Sequences in slots of the decoder", value=running)
    yield GaugeMetricFamily("tpeft_waiting_sequences", "Sequences that wait for a slot", value=waiting)
    yield GaugeMetricFamily("tpeft_kv_usage_ratio", "Part of the caches in use", value=running / slots if slots else 0)
    for field, name, about in _COUNTED:
        yield CounterMetricFamily(name, about, value=0 if stats is None else getattr(stats, field))


@dataclass(frozen=True)
class AdapterFigures:
    """What is known of adapters.

    Attributes:
        residency: adapter -> tier.
        rows: adapters that fit on the device.
        pins: pinned adapters.
        ranks: returns the ranks of adapters that were read.
    """

    residency: Mapping[str, str]
    rows: int
    pins: Collection[str]
    ranks: Callable[[Iterable[str]], Mapping[str, int]]


def of_adapters(stats: GenerationStats | None, adapters: AdapterFigures, most: int) -> Iterator[Metric]:
    """Yield the metrics of adapters in the forms of vLLM, which routers read.

    Args:
        stats: figures of the decoder.
        adapters: the adapters.
        most: adapters to name at most.
    """
    lists = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
    requests = GaugeMetricFamily("tpeft_lora_requests_info", "Adapters in use; the value is the time", labels=lists)
    running, waiting = ({}, {}) if stats is None else (stats.running_tasks, stats.waiting_tasks)
    requests.add_metric((str(adapters.rows), _names(running, most), _names(waiting, most)), time.time())
    yield requests
    labels = ("adapter_name", "level", "pinned", "rank")
    loaded = GaugeMetricFamily("tpeft_lora_adapter_loaded", "1 for each adapter in memory", labels=labels)
    resident = {name: tier for name, tier in adapters.residency.items() if tier != "disk"}
    shown = sorted(resident)[:most]
    ranks = adapters.ranks(shown)
    for name in shown:
        level = "cpu" if resident[name] == "host" else "gpu"
        loaded.add_metric((name, level, str(name in adapters.pins).lower(), str(ranks.get(name, ""))), 1)
    yield loaded
    number = sum(tier != "host" for tier in resident.values())
    yield GaugeMetricFamily("tpeft_num_gpu_loaded_lora_adapters", "Adapters on the device", value=number)
    yield GaugeMetricFamily("tpeft_max_gpu_lora_adapters", "Adapters that fit on the device", value=adapters.rows)


def _names(tasks: Mapping[Hashable, int], most: int) -> str:
    names: Sequence[str] = sorted(str(task) for task in tasks if task != BASE_TASK)
    return ",".join(names[:most])
