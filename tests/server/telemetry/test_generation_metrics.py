from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.runtime.generation.stats import GenerationStats
from tpeft_deploy.runtime.server.telemetry.inference_events import GenerationFigures, InferenceEvent
from tpeft_deploy.runtime.server.telemetry.metrics import Metrics

NOTHING = GenerationStats(0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0)


def event(task: str, times: list[list[float]], *, failed: bool = False) -> InferenceEvent:
    figures = GenerationFigures(7, 100.0, times)
    return InferenceEvent("acme", task, [], 1, Timing(100.0), 0.5, failed=failed, generation=figures)


def series(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_tokens_and_their_times_are_counted_by_task() -> None:
    metrics = Metrics(1, dict, dict, lambda: 0)
    metrics.inference(event("a", [[100.2, 100.23, 100.25], [100.4]]))
    metrics.inference(event("a", [[101.5]], failed=True))
    metrics.inference(event("b", [[100.1, 100.2]]))
    found, labels = series(metrics), '{task="a",tenant="acme"}'
    assert found[f"tpeft_prompt_tokens_total{labels}"] == 14
    assert found[f"tpeft_generation_tokens_total{labels}"] == 5
    assert found[f"tpeft_time_to_first_token_seconds_count{labels}"] == 3
    assert round(found[f"tpeft_time_to_first_token_seconds_sum{labels}"], 6) == 2.1
    assert found['tpeft_time_to_first_token_seconds_bucket{le="0.5",task="a",tenant="acme"}'] == 2
    assert found[f"tpeft_time_between_tokens_seconds_count{labels}"] == 2
    assert found['tpeft_time_between_tokens_seconds_bucket{le="0.025",task="a",tenant="acme"}'] == 1
    assert found['tpeft_generation_tokens_total{task="other",tenant=""}'] == 2
    metrics.drop("acme", "a")
    assert f"tpeft_prompt_tokens_total{labels}" not in series(metrics)


def test_tasks_that_do_not_generate_have_no_series_of_tokens() -> None:
    metrics = Metrics(9, dict, dict, lambda: 0)
    metrics.inference(InferenceEvent("acme", "a", [], 1, Timing(0.0), 0.1, failed=False))
    assert not [name for name in series(metrics) if name.startswith("tpeft_prompt_tokens")]


def test_sequences_and_adapters_are_shown_as_routers_read_them() -> None:
    stats = replace(NOTHING, running=2, waiting=3, reused_tokens=16, prefilled_tokens=90, steps=4, preempted=1)
    stats = replace(stats, running_tasks={"a": 1, "base": 1}, waiting_tasks={"b": 2, "a": 1})
    tiers = {"a": "device", "b": "host", "c": "disk", "d": "folded"}
    asked: list[str] = []

    def ranks(names: Iterable[str]) -> dict[str, int]:
        asked.extend(names)
        return {"a": 16, "b": 0}

    known: Any = {"generation": lambda: stats, "pins": lambda: {"a"}, "ranks": ranks}
    metrics = Metrics(9, lambda: tiers, lambda: {"rows": 5}, lambda: 0, **known)
    found = series(metrics)
    assert found["tpeft_running_sequences"] == 2
    assert found["tpeft_waiting_sequences"] == 3
    assert found["tpeft_kv_usage_ratio"] == 0.25
    assert found["tpeft_prefix_hit_tokens_total"] == 16
    assert found["tpeft_prefilled_tokens_total"] == 90
    assert found["tpeft_preemptions_total"] == 1
    lora = 'tpeft_lora_requests_info{max_lora="4",running_lora_adapters="a",waiting_lora_adapters="a,b"}'
    assert found[lora] > 1e9
    loaded = [name for name in found if name.startswith("tpeft_lora_adapter_loaded")]
    assert loaded == [
        'tpeft_lora_adapter_loaded{adapter_name="a",level="gpu",pinned="true",rank="16"}',
        'tpeft_lora_adapter_loaded{adapter_name="b",level="cpu",pinned="false",rank="0"}',
        'tpeft_lora_adapter_loaded{adapter_name="d",level="gpu",pinned="false",rank=""}',
    ]
    assert asked == ["a", "b", "d"]
    assert (found["tpeft_num_gpu_loaded_lora_adapters"], found["tpeft_max_gpu_lora_adapters"]) == (2, 4)
