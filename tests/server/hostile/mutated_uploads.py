"""Uploads near valid ones: bits, headers and configurations changed at random."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable

import numpy as np
from safetensors.numpy import save

from tests import nets

VALUES: list[object] = [
    None, True, -1, 0, 1, 1e308, 10**30, "", "x" * 1000, "(a+)+$", ".*", "all-linear", [], {}, [[]], ["up"] * 1000,
    {"(a|a)*$": 3}, {"up": 10**9}, {".*": 2}, {"": 0},
]  # fmt: skip
KEYS = ["r", "lora_alpha", "alpha_pattern", "rank_pattern", "target_modules", "peft_type", "use_dora", "use_rslora"]


def breed(seed: int) -> dict[str, bytes]:
    """The parts of an upload: "weights", and often "config"."""
    choice = random.Random(seed)
    parts = dict(choice.choice(_valid()))
    for _ in range(choice.randint(1, 3)):
        name = choice.choice(sorted(parts))
        parts[name] = choice.choice(WEIGHTS if name == "weights" else CONFIGS)(parts[name], choice)
    return parts


@functools.cache
def _valid() -> list[dict[str, bytes]]:
    numbers = np.random.default_rng(0)
    found = [{"weights": nets.adapter_for(nets.conv_net()[0], {"up.weight": (2, 2)}, seed=1).to_bytes()}]
    for kind, shapes in (
        ("LORA", {"lora_A.weight": (2, 8), "lora_B.weight": (16, 2)}),
        ("IA3", {"ia3_l": (16, 1)}),
        ("LOKR", {"lokr_w1": (4, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}),
        ("LOHA", {"hada_w1_a": (16, 2), "hada_w1_b": (2, 8), "hada_w2_a": (16, 2), "hada_w2_b": (2, 8)}),
    ):
        tensors = {
            f"base_model.model.up.{name}": numbers.standard_normal(shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        config = {"peft_type": kind, "r": 2, "alpha": 2, "lora_alpha": 2, "target_modules": ["up"]}
        found.append({"weights": save(tensors), "config": json.dumps(config | {"feedforward_modules": []}).encode()})
    return found


def _flip(data: bytes, choice: random.Random) -> bytes:
    changed = bytearray(data or b"x")
    for _ in range(choice.randint(1, 4)):
        changed[choice.randrange(min(len(changed), 600))] ^= 1 << choice.randrange(8)
    return bytes(changed)


def _cut(data: bytes, choice: random.Random) -> bytes:
    start = choice.randrange(len(data) + 1)
    return data[:start] + data[start : start + 40] * choice.choice([0, 2, 500])


def _header(data: bytes, choice: random.Random) -> bytes:
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        name = choice.choice(sorted(header))
        other = (
            name.replace("up", choice.choice(["head", "stem", "up.up", "a" * 200])) if choice.random() < 0.3 else name
        )
        entry = header.pop(name)
        if "shape" in entry and choice.random() < 0.8:
            entry["shape"] = [choice.choice([size, 0, 1, 35000, 2**40, -1]) for size in entry["shape"]]
        if "shape" in entry and choice.random() < 0.5:
            entry["data_offsets"] = [0, 0]
        header |= {f"{other}.{n}" if n else other: entry for n in range(choice.choice([1, 1, 300]))}
        text = json.dumps(header).encode()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return _flip(data, choice)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _entry(data: bytes, choice: random.Random) -> bytes:
    try:
        config = json.loads(data)
        config |= {choice.choice([*KEYS, *config]): choice.choice(VALUES) for _ in range(choice.randint(1, 3))}
    except (ValueError, TypeError):
        return _flip(data, choice)
    return json.dumps(config).encode()


Change = Callable[[bytes, random.Random], bytes]
WEIGHTS: list[Change] = [_flip, _cut, _header, _header]
CONFIGS: list[Change] = [_flip, _cut, _entry, _entry, _entry]
