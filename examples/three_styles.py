"""Generate text in three styles at once: one small language model, three LoRA adapters, one batch.

A Llama of 0.8 million weights learns English from Python's documentation, in byte-level tokens; one adapter each then
learns Python code, licences, and descriptions of data sets, all from the packages that are installed.  The bundle
serves them together, and report.html shows their texts side by side.  Two to three minutes on two cores.

    python examples/three_styles.py [DIRECTORY]
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import pydoc_data.topics
import sys
import time
from collections.abc import Iterable, Mapping
from html import escape
from importlib import import_module, metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.columns import Columns
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tpeft_deploy import Bundle, Runtime, export_bundle, load_adapter
from tpeft_deploy.html.page import document, tiles
from tpeft_deploy.runtime.generation import Sampling
from tpeft_deploy.runtime.text.model_text import ModelText

STYLES = {"code": "Python code", "licence": "Licences", "science": "Descriptions of data sets"}
PROMPT = "The "
LICENSED = ("matplotlib", "numpy", "onnx", "peft", "safetensors", "scikit-learn", "scipy", "tokenizers")
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"  # the model continues texts, and knows no roles
LENGTH = 128  # tokens of a row in training
VOCABULARY = 1024
MODULES = (
    "argparse",
    "asyncio.tasks",
    "collections",
    "dataclasses",
    "email.message",
    "json.decoder",
    "logging",
)


def sources() -> dict[str, str]:
    """Texts to learn from, by style; `base` is that of the base model."""
    licences = {
        _read(file.locate())
        for name in LICENSED
        for file in metadata.files(name) or ()
        if "LICENSE" in file.name.upper() and file.suffix in ("", ".txt", ".md")
    }
    return {
        "base": "\n\n".join(_prose(text) for text in pydoc_data.topics.topics.values()),
        "code": "\n\n".join(inspect.getsource(import_module(name)) for name in MODULES),
        "licence": "\n\n".join(sorted(licences))[:500_000],
        "science": "\n\n".join(
            part.read_text(encoding="utf-8")
            for part in sorted(files("sklearn.datasets.descr").iterdir(), key=lambda part: part.name)
            if part.name.endswith(".rst")
        ),
    }


def _prose(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("|", "+-", "+=")))  # no tables


def _read(path: Any) -> str:
    return Path(path).read_text(encoding="utf-8", errors="ignore") if Path(path).is_file() else ""


def byte_level_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Tokenizer with a token for each byte, for frequent sequences of bytes, and for the end of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=CHAT)


def language_model(hidden: int = 128, layers: int = 3) -> LlamaForCausalLM:
    """Llama of 0.8 million weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(model: Any, tokens: torch.Tensor, steps: int, seconds: float, rate: float, name: str, rows: int = 8) -> float:
    """Train a model to continue random parts of a text.

    Args:
        model: model, or one with an adapter.
        tokens: the text.
        steps: number of steps.
        seconds: end earlier after so many; the learning rate has fallen to zero by then too.
        rate: largest learning rate.
        name: for messages.
        rows: parts of a step.

    Returns:
        Mean loss of the last steps.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01, betas=(0.9, 0.95))
    model.train()
    losses: list[float] = []
    began, done = time.perf_counter(), 0.0
    while done < 1:
        optimiser.param_groups[0]["lr"] = rate * min(1, done / 0.1 + 0.01) * (1 - done)
        starts = torch.randint(len(tokens) - LENGTH, (rows,))
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        losses = [*losses[-19:], loss.item()]
        before, done = done, max(done + 1 / steps, (time.perf_counter() - began) / seconds)
        if int(done * 5) > int(before * 5):
            print(f"{name}: {min(done, 1):.0%}, {sum(losses) / len(losses):.2f} nats a token", file=sys.stderr)
    model.eval()
    return sum(losses) / len(losses)


def learn(place: Path, steps: int = 2000, adapter_steps: int = 200) -> dict[str, Path]:
    """Train the base and the adapters, and save them; returns the adapters' directories."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as fast as two in so small a model, and much faster beside other work
    texts = sources()
    tokenizer, model = byte_level_tokenizer(texts.values()), language_model()
    tokens = {style: torch.tensor(tokenizer.encode(text)) for style, text in texts.items()}
    train(model, tokens["base"], steps, 60, 8e-3, "base")
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=40)
    model.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    saved = {}
    for style in STYLES:
        base = LlamaForCausalLM.from_pretrained(place / "base")
        adapted = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        train(adapted, tokens[style], adapter_steps, 15, 6e-3, style)
        saved[style] = place / "adapters" / style
        adapted.save_pretrained(saved[style])
    return saved


def export(place: Path, saved: Mapping[str, Path]) -> Bundle:
    """Export the base with its tokenizer, and the adapters."""
    base = LlamaForCausalLM.from_pretrained(place / "base")
    adapters = {style: load_adapter(path, base=base) for style, path in saved.items()}
    return export_bundle(place / "base", adapters, place / "bundle", generation=True)


async def write_together(runtime: Runtime, text: ModelText, length: int) -> dict[str, str]:
    """Continue one prompt in all styles at once; the texts are shown as they come."""
    written = dict.fromkeys(["base", *STYLES], PROMPT)
    prompt = text.encode(PROMPT)

    async def write(style: str, live: Live) -> None:
        sampling: Sampling = text.sampling(seed=3)
        options: Any = {"max_new_tokens": length, "sampling": sampling, "text": text.detokeniser(prompt)}
        async for token in runtime.stream(prompt, style, **options):
            written[style] += token.text
            live.update(_columns(written))

    with Live(_columns(written), refresh_per_second=8) as live:
        await asyncio.gather(*[write(style, live) for style in written])
    return written


def _columns(written: Mapping[str, str]) -> Columns:
    return Columns([Panel(Text(text), title=style, width=56) for style, text in written.items()])


def page(written: Mapping[str, str], figures: Mapping[str, str]) -> str:
    """Render the texts side by side."""
    names = {"base": "Base: Python's documentation", **STYLES}
    shown = "".join(
        f"<section><h2>{escape(names[style])}</h2><pre>{escape(text)}</pre></section>"
        for style, text in written.items()
    )
    body = f"""<h1>One language model, three styles, one batch</h1>
<p class="soft">A Llama of 0.8 million weights, trained on Python's documentation, and three LoRA adapters.
All texts continue <code>{escape(PROMPT)}</code> with the same random numbers, in the same runs of the model.</p>
{tiles(dict(figures))}<div class="thirds">{shown}</div>"""
    return document("tpeft-deploy: three styles", body, style="pre { white-space: pre-wrap; overflow-wrap: anywhere; }")


def main(place: Path, length: int = 400) -> None:
    began = time.perf_counter()
    saved = learn(place)
    trained = time.perf_counter()
    bundle = export(place, saved)
    exported = time.perf_counter()
    with Runtime(bundle.path, provider="cpu") as runtime:
        written = asyncio.run(write_together(runtime, ModelText.open(bundle), length))
    seconds = time.perf_counter() - exported
    figures = {
        "trained": f"{trained - began:.0f} s",
        "exported and proved": f"{exported - trained:.0f} s",
        "tokens a second, all texts": f"{length * len(written) / seconds:,.0f}",
    }
    (place / "report.html").write_text(page(written, figures), encoding="utf-8")
    (place / "texts.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    print(f"{place / 'report.html'} has the texts. More:")
    tool = os.path.relpath(Path(sys.executable).with_name("tpeft-deploy"))
    print(f"    {tool} generate {bundle.path} --task code --prompt 'def '")
    print(f"    {tool} serve {bundle.path}  # for the package openai, as README.md shows")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart-text"))
