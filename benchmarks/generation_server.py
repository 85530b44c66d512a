"""Streams of the server beside those of `Runtime.stream`: throughput, and processor time of a streamed token.

    python -m benchmarks.generation_server --cache DIRECTORY [--rounds N] [--streams N]

32 streams of 8 adapters, 64 tokens each, Llama of 5 M weights, greedy.  `tpeft-deploy serve` answers completions of
OpenAI's API on the first core, to clients written with asyncio on the second; in turns with it, a process on the first
core takes the same streams from `Runtime.stream`, with their text.  Texts must be equal.  Processor time is that of the
whole processes, from /proc.  Medians over rounds; nothing else is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.generation import SMALL, TARGETS, model
from benchmarks.server_echo import TICK, _key, started
from tpeft_deploy import Bundle, Runtime, export_bundle, load_adapter
from tpeft_deploy.runtime.text.model_text import ModelText

TASKS = [f"t{number}" for number in range(8)]
TOKENS, PROMPT = 64, 8
OPTIONS: dict[str, Any] = {"provider": "cpu", "threads": 1, "max_tokens": 128}


def exported(cache: Path) -> Bundle:
    """The bundle with a tokenizer of whole words, exported once."""
    import torch
    from peft import LoraConfig, get_peft_model

    place = cache / "llama-text"
    if not (place / "bundle" / "manifest.json").is_file():
        base = model(SMALL)
        base.save_pretrained(place / "base")
        words = {f"w{number}": number for number in range(SMALL["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(str(place / "base"))
        for seed, task in enumerate(TASKS):
            torch.manual_seed(seed)
            config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
            get_peft_model(model(SMALL), config).save_pretrained(str(place / task))
        adapters = {task: load_adapter(place / task, base=base) for task in TASKS}
        export_bundle(str(place / "base"), adapters, place / "bundle", generation=True)
    return Bundle.open(place / "bundle")


def prompts(streams: int) -> list[list[int]]:
    found: list[list[int]] = np.random.default_rng(0).integers(1, SMALL["vocab_size"], (streams, PROMPT)).tolist()
    return found


def serve_runtime(path: str, streams: int) -> None:
    """Take the streams from a runtime once for each line of stdin, and print the texts' digest."""
    text = ModelText.open(Bundle.open(Path(path)))

    async def one(runtime: Runtime, number: int, prompt: list[int]) -> str:
        task = TASKS[number % len(TASKS)]
        tokens = runtime.stream(prompt, task, max_new_tokens=TOKENS, text=text.detokeniser(prompt))
        return "".join([token.text or "" async for token in tokens])

    async def everything(runtime: Runtime) -> list[str]:
        return await asyncio.gather(*(one(runtime, number, prompt) for number, prompt in enumerate(prompts(streams))))

    with Runtime(path, **OPTIONS, kv_bytes=kv_bytes(streams)) as runtime:
        print("ready", flush=True)
        for _ in sys.stdin:
            print(json.dumps(asyncio.run(everything(runtime))), flush=True)


def kv_bytes(streams: int) -> int:
    heads = SMALL["num_attention_heads"] // 2
    size = SMALL["hidden_size"] // SMALL["num_attention_heads"]
    return streams * 128 * 2 * SMALL["num_hidden_layers"] * heads * size * 4


async def from_server(port: int, key: str, streams: int) -> list[str]:
    async def one(number: int, prompt: list[int]) -> str:
        body = {"model": TASKS[number % len(TASKS)], "prompt": prompt, "max_tokens": TOKENS, "stream": True}
        text = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n".encode() + text)
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise SystemExit((answer + await reader.read(2000)).decode())
        events = []
        while not (line := await reader.readline()).startswith(b"data: [DONE]"):
            if line.startswith(b"data: "):
                events.append(line[6:])
        writer.close()
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    return await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts(streams))))


def spent(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def rounds(bundle: Bundle, place: Path, count: int, streams: int) -> dict[str, float]:
    """Medians over rounds, of which the first warms up and does not count."""
    key = _key(place / "state", "tenant", "infer")
    settings = {"kv_bytes": kv_bytes(streams), "max_tokens": 128, "requests_per_s": 1e9, "rows_per_s": 1e9}
    (place / "settings.toml").write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
    command = ["-c", "from tpeft_deploy.cli import main; main()", "serve", str(bundle.path), "--no-access-log"]
    command += ["--state", str(place / "state"), "--port", "0", "--threads", "1", "--config", f"{place}/settings.toml"]
    code = f"from benchmarks.generation_server import serve_runtime; serve_runtime({str(bundle.path)!r}, {streams})"
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        server, port = stack.enter_context(started(command, r"serving on http://127.0.0.1:(\d+)"))
        direct = stack.enter_context(
            subprocess.Popen(
                ["taskset", "-c", "0", sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(direct.kill)
        assert direct.stdin is not None
        assert direct.stdout is not None
        direct.stdout.readline()
        for turn in range(count + 1):
            before, began = spent(server.pid), time.perf_counter()
            texts = asyncio.run(from_server(port, key, streams))
            served, used = time.perf_counter() - began, spent(server.pid) - before
            before, began = spent(direct.pid), time.perf_counter()
            direct.stdin.write("go\n")
            direct.stdin.flush()
            expected = json.loads(direct.stdout.readline())
            alone, least = time.perf_counter() - began, spent(direct.pid) - before
            if texts != expected:
                raise SystemExit("the server's texts are not the runtime's")
            if turn:
                found.setdefault("server / runtime, tokens/s", []).append(alone / served)
                found.setdefault("server, tokens/s", []).append(streams * TOKENS / served)
                own = (used - least) / (streams * TOKENS)
                found.setdefault("processor time of a token beyond the runtime's, us", []).append(1e6 * own)
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--streams", type=int, default=32)
    options = parser.parse_args()
    bundle = exported(options.cache)
    os.sched_setaffinity(0, {1})
    with tempfile.TemporaryDirectory() as place:
        for name, value in rounds(bundle, Path(place), options.rounds, options.streams).items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
