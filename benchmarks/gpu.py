"""Everything that only a CUDA device shows, checked and timed in one call on a machine without network.

python -m benchmarks.gpu build DIR                      # here: writes the models; needs torch and onnx
python -m benchmarks.gpu run DIR --out OUT              # there: needs numpy, safetensors and onnxruntime-gpu

Every check runs in a process of its own, so that one which crashes is recorded and the others go on.  OUT gets
gpu.json and gpu.md, a table for NOTES.md.  `--provider cpu` runs what a CPU can answer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ENCODERS = ("encoder", "encoder_half", "large", "large_half", "queries_half", "wide_half")
# What one check sees otherwise than the others.
ENVIRONMENT = {"(h) convs in float32, TF32 by the environment": {"NVIDIA_TF32_OVERRIDE": "1"}}
ROOT = Path(__file__).parent.parent
MARK = "RESULT "


def checks() -> dict[str, Callable[[Any], Any]]:
    """All checks, those that matter most first."""
    from benchmarks import gpu_questions as questions
    from benchmarks import gpu_serving as serving

    return {
        **{f"answers, {name}": serving.answers(name) for name in ("encoder", "encoder_half", "convs")},
        "recorded answers": serving.recorded_answers,
        **{f"mixed rows, {name}": serving.mixed_rows(name) for name in ENCODERS},
        **{f"factored, {name}": serving.factored(name) for name in ENCODERS},
        "served rows": serving.served_rows,
        "switching": serving.switching,
        "memory limit": serving.memory_limit,
        "recording among others": serving.recording_among_others,
        **{f"(a) rank 0, {kind}": questions.rank_zero(kind) for kind in questions.RANKS},
        "(b) hot fold": questions.hot_fold,
        "(c) native adapter": questions.native_adapter,
        "(d) fed convs": questions.fed_convs,
        "(e) copies": questions.copies,
        "(f) shared weights": questions.shared_weights,
        "(g) launches": questions.launches,
        "(h) convs in float32": questions.exact_convs,
        "(h) convs in float32, TF32 by the environment": questions.exact_convs,
    }


def check(options: argparse.Namespace) -> None:
    """One check, in this process; the result is the last line."""
    from benchmarks.gpu_fixed import NeedsCuda, Place
    from tpeft_deploy.runtime.sessions.providers import choose

    try:
        place = Place(Path(options.directory), choose(options.provider), options.seconds)
        result = {"status": "done", **asdict(checks()[options.check](place))}
    except NeedsCuda:
        result = {"status": "needs CUDA"}
    except Exception as error:  # recorded with its kind; the traceback goes to the log
        print(MARK + json.dumps({"status": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}), flush=True)
        raise
    print(MARK + json.dumps(result), flush=True)


def run(options: argparse.Namespace) -> None:
    """Run all checks, each in a process of its own, until the time for all is over; each result is written at once."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "provider": options.provider, "checks": {}}
    end = time.monotonic() + options.deadline
    for name in checks():
        if options.only and not any(part in name for part in options.only):
            continue
        begin, left = time.monotonic(), end - time.monotonic()
        found = isolated(name, options, out, min(options.timeout, left)) if left > 5 else {"status": "no time left"}
        report["checks"][name] = found | {"seconds": round(time.monotonic() - begin, 1)}
        write(report, out)
        print(f"{name}: {found['status']}, {time.monotonic() - begin:.1f} s", flush=True)
    if options.provider == "cuda" and options.tests:
        report["tests"] = gpu_tests(end - time.monotonic())
        write(report, out)
    print(markdown(report))


def write(report: dict[str, Any], out: Path) -> None:
    """Write what is known so far."""
    (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu.md").write_text(markdown(report))


def isolated(name: str, options: argparse.Namespace, out: Path, seconds: float) -> dict[str, Any]:
    """Run one check in a process of its own, for at most that many seconds."""
    command = [sys.executable, "-m", "benchmarks.gpu", "check", options.directory, "--check", name]
    command += ["--provider", options.provider, "--seconds", str(options.seconds)]
    own = os.environ | ENVIRONMENT.get(name, {})
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=seconds, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return {"status": f"not done in {seconds:.0f} s"}
    with (out / "gpu.log").open("a") as log:
        log.write(f"== {name}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}\n")
    results = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not results:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return {"status": f"the process ended with {done.returncode}: {last[0][:200]}"}
    found: dict[str, Any] = json.loads(results[-1][len(MARK) :])
    if done.returncode and found["status"] == "done":
        found["status"] = f"done, then the process ended with {done.returncode}"
    return found


def gpu_tests(seconds: float) -> str:
    """Run the tests marked `gpu`, where what they need is installed; the checks ask the same of carried models."""
    missing = [name for name in ("pytest", "onnx", "onnxscript", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        return f"not run: no {', '.join(missing)} here"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "tests/runtime/gpu/test_cuda.py",
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 1), check=False)
    except subprocess.TimeoutExpired:
        return f"not done in {seconds:.0f} s"
    return "\n".join(done.stdout.strip().splitlines()[-40:])


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    import onnxruntime

    found = {"python": platform.python_version(), "onnxruntime": str(onnxruntime.__version__), "device": "none"}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return found
    return found | {"device": done.stdout.strip()}


def markdown(report: dict[str, Any]) -> str:
    """A table of claims and one of figures."""
    about = "; ".join(f"{name} {value}" for name, value in report["machine"].items())
    lines = [f"## `python -m benchmarks.gpu`, {report['provider']}", "", about, ""]
    lines += ["| check | claim | measured | limit | holds |", "|---|---|---|---|---|"]
    for name, found in report["checks"].items():
        for own in found.get("claims", ()):
            holds = "yes" if own["holds"] else "**no**"
            lines.append(f"| {name} | {own['claim']} | {own['value']:.3g} | {own['limit']} | {holds} |")
        if found["status"] != "done":
            lines.append(f"| {name} | {found['status']} | | | |")
    lines += ["", "| check | figure | |", "|---|---|---|"]
    for name, found in report["checks"].items():
        for what, value in found.get("figures", {}).items():
            lines.append(f"| {name} | {what} | {value if isinstance(value, str) else format(value, '.4g')} |")
    if "tests" in report:
        lines += ["", "Tests marked `gpu`:", "", "```", report["tests"], "```"]
    return "\n".join(lines) + "\n"


def build(options: argparse.Namespace) -> None:
    """The models, by an exporter that the other machine does not need."""
    from benchmarks import gpu_models

    place = Path(options.directory)
    gpu_models.build(place, layers=options.layers, width=options.width, channels=options.channels)
    file, total = gpu_models.largest(place)
    print(f"{total / 2**20:.1f} MiB in {place}, the largest file {file.relative_to(place)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    verbs = parser.add_subparsers(required=True)
    for name, verb in (("build", build), ("run", run), ("check", check)):
        own = verbs.add_parser(name)
        own.set_defaults(verb=verb)
        own.add_argument("directory")
        if name == "build":
            own.add_argument("--layers", type=int, default=6)
            own.add_argument("--width", type=int, default=384)
            own.add_argument("--channels", type=int, default=64)
            continue
        own.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
        own.add_argument("--seconds", type=float, default=3.0, help="How long each timing takes.")
    verbs.choices["check"].add_argument("--check", required=True)
    verbs.choices["run"].add_argument("--out", required=True)
    verbs.choices["run"].add_argument("--timeout", type=float, default=120.0, help="Seconds that a check may take.")
    verbs.choices["run"].add_argument("--deadline", type=float, default=560.0, help="Seconds that all checks may take.")
    verbs.choices["run"].add_argument("--tests", action="store_true", help="Run the tests marked `gpu` too.")
    verbs.choices["run"].add_argument("--only", nargs="*", help="Checks that have one of these in their name.")
    options = parser.parse_args()
    options.directory = str(Path(options.directory).resolve())
    options.verb(options)


if __name__ == "__main__":
    main()
