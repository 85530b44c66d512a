"""What generation on mixed rows costs, beside a plain loop on one folded model and `generate` of merged models.

    python -m benchmarks.generation --cache DIRECTORY [--large] [--threads N] [--seconds S] [--only PART]

| part | what |
|---|---|
| rows | 4 rows of 4 adapters, 64 tokens: `Runtime.generate`, ONNX Runtime on one folded model by hand, transformers |
| past | a step of 4 rows behind 3,000 tokens: the decoder, the same banked graph by hand, the folded model by hand |
| traffic | 64 requests that arrive at random, of random lengths: continuous batching against static batches of 8 |
| prefix | time to the first token of a prompt of 505, the first 500 known or not |
| genai | 8 rows of 8 adapters, 64 tokens: `Runtime.generate`, onnxruntime-genai in turns (if it is installed) |

Cases take turns in one process (`runtime.bench.measure`); ratios are medians of the ratios within a round.  Greedy,
rank 8 on every linear, Llama of 5 M weights, with `--large` of 110 M.  Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from tpeft_deploy import Bundle, Runtime, export_bundle, load_adapter
from tpeft_deploy.runtime.bench.measure import Case, interleave
from tpeft_deploy.runtime.generation.decoder import BankedDecoder
from tpeft_deploy.runtime.generation.handle import GenerationRequest
from tpeft_deploy.runtime.sessions.banked import Session
from tpeft_deploy.tucker import Array

TASKS = ["t0", "t1", "t2", "t3"]
EIGHT = [*TASKS, "t4", "t5", "t6", "t7"]
TOKENS, PROMPT, PAST = 64, 8, 3000
POSITIONS = 4096
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "vocab_size": 2000,
}
LARGE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 32000,
}
Tokens = list[list[int]]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model(sizes: Mapping[str, int]) -> Any:
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    heads = sizes["num_attention_heads"] // 2
    config = transformers.LlamaConfig(
        **sizes, **ends, num_key_value_heads=heads, max_position_embeddings=POSITIONS, tie_word_embeddings=True
    )
    return transformers.LlamaForCausalLM(config).eval()


def exported(cache: Path, sizes: Mapping[str, int], tasks: Sequence[str] = TASKS, end: int | None = None) -> Bundle:
    """The bundle of a model with an adapter for each task, exported once.

    Args:
        cache: directory of bundles.
        sizes: sizes of the model.
        tasks: names of the tasks.
        end: token that ends a sequence, for a bundle that onnxruntime-genai runs; None exports for generation.
    """
    place = cache / "-".join(["llama", str(sizes["hidden_size"]), *(["ends"] if end else []), *tasks[len(TASKS) :]])
    if not (place / "bundle" / "manifest.json").is_file():
        for seed, task in enumerate(tasks):
            torch.manual_seed(seed)
            config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
            get_peft_model(model(sizes), config).save_pretrained(str(place / task))
        base = model(sizes)
        base.config.eos_token_id = end
        base.save_pretrained(str(place / "base"))
        adapters = {task: load_adapter(place / task, base=base) for task in tasks}
        export_bundle(place / "base", adapters, place / "bundle", generation=end is None)
    return Bundle.open(place / "bundle")


class ByHand:
    """The shortest loop on a graph in slot form that ONNX Runtime's Python has: bound once, tokens written in place."""

    def __init__(
        self, session: onnxruntime.InferenceSession, bundle: Bundle, rows: int, bank: Mapping[str, Any]
    ) -> None:
        ports = bundle.manifest.decoder
        assert ports is not None
        shapes = {port.name: port.shape for port in bundle.manifest.inputs}
        self.session, self.binding = session, session.io_binding()
        self.tokens, self.lengths = np.zeros((rows, 1), np.int64), np.zeros(rows, np.int64)
        self.logits = np.empty((rows, ports.vocabulary), np.float32)
        self.index = np.arange(1, rows + 1)
        self.kept: list[Array] = []
        inputs = {ports.tokens: self.tokens, ports.lengths: self.lengths}
        for name, array in inputs.items():
            self._bind(self.binding.bind_input, name, array)
        if bank:
            self._bind(self.binding.bind_input, "adapter_index", self.index)
        for name, value in bank.items():
            self.binding.bind_ortvalue_input(name, value)
        for past, present in ports.caches:
            memory = np.zeros((rows, int(shapes[past][1]), POSITIONS, int(shapes[past][3])), np.float32)
            self.kept.append(memory)
            self._bind(self.binding.bind_input, past, memory)
            self._bind(self.binding.bind_output, present, memory)
        self._bind(self.binding.bind_output, ports.logits, self.logits)
        self._tokens_name, self._lengths_name = ports.tokens, ports.lengths

    @staticmethod
    def _bind(bind: Callable[..., None], name: str, array: Array) -> None:
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def generate(self, prompts: Array) -> None:
        """All prompts in one prefill, then steps of one token."""
        self.lengths[:] = 0
        self._bind(self.binding.bind_input, self._tokens_name, prompts)
        self.session.run_with_iobinding(self.binding)
        self._bind(self.binding.bind_input, self._tokens_name, self.tokens)
        for step in range(TOKENS - 1):
            self.tokens[:, 0] = self.logits.argmax(-1)
            self.lengths[:] = prompts.shape[1] + step
            self.session.run_with_iobinding(self.binding)

    def step(self) -> None:
        self.lengths[:] = PAST
        self.session.run_with_iobinding(self.binding)


@contextmanager
def opened(bundle: Bundle, threads: int, rows: int = 4, tokens: int = POSITIONS) -> Iterator[Runtime]:
    with Runtime(bundle.path, provider="cpu", threads=threads, preload=False, max_tokens=tokens) as runtime:
        plan = runtime._generation._plan
        assert plan is not None
        size = plan.nbytes // plan.slots
    settings: dict[str, Any] = {"kv_bytes": rows * size, "max_tokens": tokens}
    with Runtime(bundle.path, provider="cpu", threads=threads, prefix_bytes=2**26, **settings) as runtime:
        yield runtime


def folded_session(runtime: Runtime) -> onnxruntime.InferenceSession:
    """The session of the base with a task's changes in its weights."""
    runtime.pin(TASKS[0], folded=True)
    found = runtime._part(None).folds.find(runtime._versions.find(TASKS[0]), 1)
    assert found is not None
    return found._session


def ratios(times: Mapping[str, list[float]], ours: str) -> dict[str, float]:
    """Case -> median seconds, and of the others how many times as long as ours they took."""
    found = {f"{name}, ms": statistics.median(own) * 1e3 for name, own in times.items()}
    for name, own in times.items():
        if name != ours:
            found[f"{name} / {ours}"] = statistics.median(b / a for a, b in zip(times[ours], own, strict=True))
    return found


def rows_part(bundle: Bundle, sizes: Mapping[str, int], options: argparse.Namespace) -> dict[str, float]:
    prompts = np.random.default_rng(0).integers(sizes["vocab_size"], size=(4, PROMPT))
    place = bundle.path.parent
    merged = [PeftModel.from_pretrained(model(sizes), str(place / task)).merge_and_unload() for task in TASKS]
    rows = [torch.tensor(prompt[None]) for prompt in prompts]

    def in_turns() -> list[Any]:
        return [
            own.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=TOKENS)
            for own, row in zip(merged, rows, strict=True)
        ]

    with opened(bundle, options.threads) as runtime, torch.inference_mode():
        by_hand = ByHand(folded_session(runtime), bundle, 4, {})
        found = runtime.generate(prompts.tolist(), tasks=TASKS, max_new_tokens=TOKENS)
        assert found == [out[0, PROMPT:].tolist() for out in in_turns()]
        cases: dict[str, Case] = {
            "generate": lambda: runtime.generate(prompts.tolist(), tasks=TASKS, max_new_tokens=TOKENS),
            "one folded model by hand": lambda: by_hand.generate(prompts),
            "transformers in turns": in_turns,
        }
        return ratios(interleave(cases, options.seconds), "generate")


def past_part(bundle: Bundle, _: Mapping[str, int], options: argparse.Namespace) -> dict[str, float]:
    with opened(bundle, options.threads) as runtime:
        service, session = runtime._generation, runtime._part(None).session
        assert isinstance(session, Session)
        assert service._plan is not None
        rows = runtime._part(None).open_rows()
        assert rows is not None
        manifest = runtime._part(None).manifest
        decoder = BankedDecoder(manifest, rows, runtime._residency, service._plan, "cpu", gathered=True)
        versions = [service.acquire(task) for task in TASKS]
        tokens, pasts = np.ones(4, np.int64), np.full(4, PAST)
        banked = ByHand(session._session, bundle, 4, runtime._residency._bank.values)
        folded = ByHand(folded_session(runtime), bundle, 4, {})
        cases: dict[str, Case] = {
            "decoder": lambda: decoder.decode(range(4), tokens, pasts, versions),
            "banked graph by hand": banked.step,
            "folded model by hand": folded.step,
        }
        found = ratios(interleave(cases, options.seconds), "decoder")
        for version in versions:
            version.release()
    return found


def traffic_part(bundle: Bundle, sizes: Mapping[str, int], options: argparse.Namespace) -> dict[str, float]:
    draw = np.random.default_rng(1)
    prompts = [draw.integers(sizes["vocab_size"], size=draw.integers(4, 40)).tolist() for _ in range(64)]
    lengths = np.clip(draw.exponential(40, 64), 4, 200).astype(int).tolist()
    arrivals = np.cumsum(draw.exponential(0.002, 64)).tolist()
    tasks = [TASKS[index % 4] for index in range(64)]

    async def continuous(runtime: Runtime) -> None:
        async def one(index: int) -> None:
            await asyncio.sleep(arrivals[index])
            (handle,) = await runtime.start(GenerationRequest(prompts[index], lengths[index], task=tasks[index]))
            await asyncio.wrap_future(handle.future)

        await asyncio.gather(*map(one, range(64)))

    def static(runtime: Runtime) -> None:
        began = time.perf_counter()
        for first in range(0, 64, 8):
            part = slice(first, first + 8)
            time.sleep(max(0.0, arrivals[first + 7] - (time.perf_counter() - began)))
            runtime.generate(prompts[part], tasks=tasks[part], max_new_tokens=max(lengths[part]))

    with opened(bundle, options.threads, 8, 256) as runtime:
        cases: dict[str, Case] = {
            "continuous": lambda: asyncio.run(continuous(runtime)),
            "static": lambda: static(runtime),
        }
        return ratios(interleave(cases, options.seconds), "continuous")


def prefix_part(bundle: Bundle, sizes: Mapping[str, int], options: argparse.Namespace) -> dict[str, float]:
    draw = np.random.default_rng(2)
    prefix = draw.integers(sizes["vocab_size"], size=500).tolist()

    def prompt(known: bool) -> list[int]:
        start = prefix if known else draw.integers(sizes["vocab_size"], size=500).tolist()
        return [*start, *draw.integers(sizes["vocab_size"], size=5).tolist()]

    with opened(bundle, options.threads) as runtime:
        cases: dict[str, Case] = {
            "known": lambda: runtime.generate([prompt(True)], TASKS[0], max_new_tokens=1),
            "new": lambda: runtime.generate([prompt(False)], TASKS[0], max_new_tokens=1),
        }
        return ratios(interleave(cases, options.seconds), "known")


def with_genai(bundle: Bundle, tasks: Sequence[str], threads: int, tokens: int) -> Callable[[str, Tokens], Tokens]:
    """What generates so many tokens behind prompts of one task with onnxruntime-genai, which must be installed."""
    genai = import_module("onnxruntime_genai")  # in no extra: needs onnxruntime, and a GPU has the other one
    config = genai.Config(str(bundle.path))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    decoder = genai.Model(config)
    adapters = genai.Adapters(decoder)
    for task in tasks:
        adapters.load(str(bundle.path / "adapters" / task / bundle.digest(task) / "adapter.onnx_adapter"), task)

    def generate(task: str, prompts: Tokens) -> Tokens:
        length = len(prompts[0]) + tokens
        parameters = genai.GeneratorParams(decoder)
        parameters.set_search_options(max_length=length, min_length=length, batch_size=len(prompts))
        generator = genai.Generator(decoder, parameters)
        generator.set_active_adapter(adapters, task)
        generator.append_tokens(np.array(prompts, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [[int(token) for token in generator.get_sequence(row)][-tokens:] for row in range(len(prompts))]

    return generate


def genai_part(_: Bundle, sizes: Mapping[str, int], options: argparse.Namespace) -> dict[str, float]:
    ours = exported(options.cache, sizes, EIGHT)
    theirs = exported(options.cache, sizes, EIGHT, end=sizes["vocab_size"] - 1)
    prompts = np.random.default_rng(0).integers(sizes["vocab_size"], size=(8, PROMPT)).tolist()
    generate = with_genai(theirs, EIGHT, options.threads, TOKENS)

    def in_turns() -> Tokens:
        return [generate(task, [prompt])[0] for prompt, task in zip(prompts, EIGHT, strict=True)]

    with opened(ours, options.threads, 8) as runtime:
        assert runtime.generate(prompts, tasks=EIGHT, max_new_tokens=TOKENS) == in_turns()
        cases: dict[str, Case] = {
            "generate": lambda: runtime.generate(prompts, tasks=EIGHT, max_new_tokens=TOKENS),
            "onnxruntime-genai in turns": in_turns,
        }
        return ratios(interleave(cases, options.seconds), "generate")


PARTS = {
    "rows": rows_part,
    "past": past_part,
    "traffic": traffic_part,
    "prefix": prefix_part,
    "genai": genai_part,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--only", choices=sorted(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = LARGE if options.large else SMALL
    bundle = exported(options.cache, sizes)
    here = [name for name in PARTS if name != "genai" or find_spec("onnxruntime_genai")]
    for name in [options.only] if options.only else here:
        print(json.dumps({name: PARTS[name](bundle, sizes, options)}, indent=2), flush=True)


if __name__ == "__main__":
    main()
