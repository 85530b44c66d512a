"""`bench`: measure latency and memory of serving a bundle on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tpeft_deploy.cli.console import emit, json_option, provider_option, tf32_option
from tpeft_deploy.cli.progress_display import stages
from tpeft_deploy.cli.tool import Command, note

__all__ = ["bench"]


class _Rows(click.ParamType[tuple[int, ...]]):
    """N,N,.."""

    name = "N,N,.."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Split at commas and drop duplicates; the order is kept."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a list of batch sizes, as in 1,8,16.", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


@click.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@provider_option
@tf32_option
@click.option("--rows", type=_Rows(), default="1,8,16", show_default=True, help="Batch sizes.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads per session; one per core by default.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=20.0,
    show_default=True,
    help="Approximate total time; at least five rounds are run.",
)
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="HTML report to write.")
@json_option
def bench(
    bundle: Path,
    provider: str,
    allow_tf32: bool,
    rows: tuple[int, ...],
    threads: int | None,
    seconds: float,
    report: Path | None,
    as_json: bool,
) -> None:
    """Measure latency and memory of serving BUNDLE, compared with its base in plain ONNX Runtime.

    All cases run alternately in one process; a ratio is the median of the ratios within each round.
    """
    from tpeft_deploy.bundle.directory import Bundle
    from tpeft_deploy.files import new_file
    from tpeft_deploy.runtime.bench import bench_bundle, render

    opened = Bundle.open(bundle)
    with stages() as begin:
        found = bench_bundle(
            opened,
            provider=provider,
            rows=rows,
            seconds=seconds,
            threads=threads,
            allow_tf32=allow_tf32,
            progress=begin,
        )
    document = found.to_json()
    if report is not None:
        with new_file(report) as temporary:
            temporary.write_text(render(found), encoding="utf-8")
    note(f"provider: {found.provider} ({found.provider_reason})")
    if as_json:
        emit(document, key="cases", columns=[], as_json=True)
    else:
        _print(document)
    if report is not None:
        note(f"report: {report}")


def _print(document: dict[str, Any]) -> None:
    several = any(case["component"] for case in document["cases"])
    cases = [
        {
            **({"component": case["component"]} if several else {}),
            "rows": case["rows"],
            "case": case["case"],
            **_columns("ms", case["ms"]),
            **_columns("ratio", case["ratio"]),
        }
        for case in document["cases"]
    ]
    emit({"cases": cases}, key="cases", columns=list(cases[0]), as_json=False)
    others = [
        {
            "what": f"{entry['rows']} rows generated, {entry['case']}, tokens/s",
            **_columns("median", entry["tokens_per_s"]),
        }
        for entry in document["generation"]
    ]
    others += [
        {"what": f"switch with {entry['adapters']} known, µs", **_columns("median", entry["microseconds"])}
        for entry in document["switching"]
    ]
    if (cold := document["cold"]) is not None:
        others += [
            {"what": "load from disk, ms", **_columns("median", cold["load_ms"])},
            {"what": "first run after the load, ms", **_columns("median", cold["first_run_ms"])},
        ]
    others += [
        {"what": f"memory {entry['at']}, MB", **_columns("median", {"median": entry["bytes"] / 1e6})}
        for entry in document["memory"]
        if entry["bytes"] is not None
    ]
    others += [
        {"what": f"{entry['what']}: {entry['reason']}", **_columns("median", {})} for entry in document["left_out"]
    ]
    click.echo()
    emit({"others": others}, key="others", columns=list(others[0]), as_json=False)


def _columns(name: str, spread: dict[str, float]) -> dict[str, str]:
    quartiles = f"{_number(spread['low'])} - {_number(spread['high'])}" if "low" in spread else "-"
    return {name: _number(spread["median"]) if spread else "-", f"{name} quartiles": quartiles}


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
