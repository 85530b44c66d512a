"""Small adapters in several formats, and what their files mean by formulas of their own.

An oracle reads a file with safetensors' own reader and computes every change with plain numpy, knowing nothing of
tpeft_deploy's readers; it raises KeyError or ValueError where the file has a tensor that means nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import nn

from tpeft_deploy import Adapter, TuckerDelta
from tpeft_deploy.adapter import weight_digest

Arrays = dict[str, np.ndarray]
Meaning = tuple[Arrays, Arrays]  # changes by weight, whole tensors by name
Oracle = Callable[[Arrays, Mapping[str, Any]], Meaning]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"one": nn.Linear(20, 24), "two": nn.Linear(20, 24), "three": nn.Linear(24, 20)})
        self.conv = nn.Conv2d(12, 16, 3)
        self.head = nn.Linear(20, 5)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


SHAPES = {name: tuple(tensor.shape) for name, tensor in net().state_dict().items()}
MODULES = [name.removesuffix(".weight") for name in SHAPES if name.endswith(".weight") and name != "head.weight"]
UNDERSCORED = {f"lycoris_{module.replace('.', '_')}": module for module in ("body.one", "body.two", "conv", "head")} | {
    "lycoris_body_three": "body.three"
}


@dataclass(frozen=True)
class Subject:
    """One format: its files by name, what they mean, and how they are loaded."""

    name: str
    files: Mapping[str, bytes]
    oracle: Oracle
    scale: float | None = None

    @property
    def main(self) -> str:
        return next(name for name in self.files if name.endswith(".safetensors"))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def subjects() -> dict[str, Subject]:
    from tests.helpers.hostile.base_products import base_products  # which is built on this module

    plain = (canonical(), peft_tucker(), peft_lora(), adalora(), locon(), loha(), lokr(), sjtu())
    made = (*base_products(), *peft_dense(), *plain)
    return {subject.name: subject for subject in made}


def meaning(subject: Subject, files: Mapping[str, bytes]) -> Meaning:
    """What possibly mutated files of a subject mean."""
    data = files[subject.main]
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    extra = dict(header.get("__metadata__") or {})
    for name, content in files.items():
        if name.endswith(".json"):
            extra["config"] = json.loads(content)
    return subject.oracle(load(data), extra)


def canonical() -> Subject:
    deltas = {
        "body.one.weight": TuckerDelta(random(2, 3), (random(24, 2), random(20, 3)), 0.5),
        "conv.weight": TuckerDelta(random(2, 3, 3, 2), (random(16, 2), random(12, 3), None, random(3, 2)), 0.25),
    }
    digests = {name: weight_digest(net().get_parameter(name).detach().numpy()) for name in deltas}
    adapter = Adapter(deltas, {"head.weight": random(7, 20), "head.bias": random(7)}, digests)

    def oracle(tensors: Arrays, extra: Mapping[str, Any]) -> Meaning:
        header = json.loads(extra["tpeft"])
        changes = {}
        for name, scale in header["scales"].items():
            total = tensors.pop(f"delta/{name}/core").astype(np.float64)
            for mode in range(total.ndim):
                factor = tensors.pop(f"delta/{name}/factor.{mode}", None)
                if factor is not None:
                    total = np.moveaxis(np.tensordot(factor.astype(np.float64), total, (1, mode)), 0, mode)
            changes[name] = float(scale) * total
        return changes, {name[len("override/") :]: tensor for name, tensor in tensors.items()}

    return Subject("tpeft", {"adapter.safetensors": adapter.to_bytes()}, oracle)


def peft_tucker() -> Subject:
    prefix = "base_model.model."
    tensors = {
        "body.one.tucker_core": random(2, 3),
        "body.one.tucker_factor.0": random(24, 2),
        "body.one.tucker_factor.1": random(20, 3),
        "conv.tucker_core": random(2, 3, 3, 2),
        "conv.tucker_factor.0": random(16, 2),
        "conv.tucker_factor.1": random(12, 3),
        "conv.tucker_factor.3": random(3, 2),
        "head.weight": random(7, 20),
        "head.bias": random(7),
    }
    state = net().state_dict()
    digests = {name: weight_digest(state[name].numpy()) for name in ("body.one.weight", "conv.weight")}
    config = {"peft_type": "TPEFT_TUCKER", "scale": 0.5, "base_digests": digests}

    def oracle(tensors: Arrays, extra: Mapping[str, Any]) -> Meaning:
        tensors = {name.replace(prefix, ""): tensor for name, tensor in tensors.items()}
        changes = {}
        for module in MODULES:
            core = tensors.pop(f"{module}.tucker_core", None)
            if core is None:
                continue
            total = core.astype(np.float64)
            for mode in range(core.ndim):
                factor = tensors.pop(f"{module}.tucker_factor.{mode}", None)
                if factor is not None:
                    total = np.moveaxis(np.tensordot(factor.astype(np.float64), total, (1, mode)), 0, mode)
            changes[f"{module}.weight"] = extra["config"]["scale"] * total
        return changes, tensors

    return Subject("peft-tucker", peft_files(tensors, config), oracle)


def adalora() -> Subject:
    tensors = {
        "body.one.lora_A": random(3, 20),
        "body.one.lora_E": random(3, 1),
        "body.one.lora_B": random(24, 3),
        "body.two.lora_A": random(2, 20, seed=1),
        "body.two.lora_E": random(2, 1, seed=1),
        "body.two.lora_B": random(24, 2, seed=1),
        "head.bias": random(5),
    }
    config = {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 8, "r": 8}

    def oracle(tensors: Arrays, extra: Mapping[str, Any]) -> Meaning:
        config = extra["config"]
        tensors = {name.replace("base_model.model.", ""): tensor for name, tensor in tensors.items()}
        changes = {}
        for module in MODULES:
            if f"{module}.lora_E" not in tensors:
                continue
            a, e, b = (tensors.pop(f"{module}.lora_{letter}").astype(np.float64) for letter in "AEB")
            s = config["lora_alpha"] / (config["init_r"] + 1e-5)
            changes[f"{module}.weight"] = s * (b @ (e * a)).reshape(SHAPES[f"{module}.weight"])
        return changes, tensors

    return Subject("adalora", peft_files(tensors, config), oracle)


def peft_files(tensors: Arrays, config: Mapping[str, Any]) -> dict[str, bytes]:
    return {
        "adapter_model.safetensors": save({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}),
        "adapter_config.json": json.dumps(config).encode(),
    }


def peft_lora() -> Subject:
    tensors = {
        "body.one.lora_A.weight": random(2, 20),
        "body.one.lora_B.weight": random(24, 2),
        "body.two.lora_A.weight": random(2, 20, seed=1),
        "body.two.lora_B.weight": random(24, 2, seed=1),
        "conv.lora_A.weight": random(3, 12, 3, 3),
        "conv.lora_B.weight": random(16, 3, 1, 1),
        "head.weight": random(7, 20),
        "head.bias": random(7),
    }
    config: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_rslora": False}
    config |= {"alpha_pattern": {"conv": 5}, "rank_pattern": {"conv": 3}}
    prefix = "base_model.model."

    def oracle(tensors: Arrays, extra: Mapping[str, Any]) -> Meaning:
        config = extra["config"]
        tensors = {name.replace(prefix, ""): tensor for name, tensor in tensors.items()}
        changes = {}
        for module in MODULES:
            a, b = (tensors.pop(f"{module}.lora_{letter}.weight", None) for letter in "AB")
            if a is None and b is None:
                continue
            assert a is not None
            assert b is not None
            own = [v for p, v in config.get("alpha_pattern", {}).items() if re.match(rf"(.*\.)?({p})$", module)]
            alpha = own[0] if own else config["lora_alpha"]
            s = alpha / (math.sqrt(a.shape[0]) if config.get("use_rslora") else a.shape[0])
            product = b.reshape(b.shape[:2]).astype(np.float64) @ a.reshape(a.shape[0], -1)
            changes[f"{module}.weight"] = s * product.reshape(SHAPES[f"{module}.weight"])
        return changes, tensors

    return Subject("peft-lora", peft_files(tensors, config), oracle)


def by_module(tensors: Arrays) -> dict[str, Arrays]:
    """Tensors of LyCORIS' modules by the base's names; a key of no module is an error."""
    modules: dict[str, Arrays] = {}
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        modules.setdefault(UNDERSCORED[name], {})[suffix] = tensor
    return modules


def locon() -> Subject:
    tensors = {
        "lycoris_body_one.lora_up.weight": random(24, 2),
        "lycoris_body_one.lora_down.weight": random(2, 20),
        "lycoris_body_one.alpha": np.array(3, np.float32),
        "lycoris_body_two.lora_up.weight": random(24, 2, seed=1),
        "lycoris_body_two.lora_down.weight": random(2, 20, seed=1),
        "lycoris_body_two.alpha": np.array(1, np.float32),
        "lycoris_conv.lora_up.weight": random(16, 3, 1, 1),
        "lycoris_conv.lora_mid.weight": random(3, 3, 3, 3),
        "lycoris_conv.lora_down.weight": random(3, 12, 1, 1),
        "lycoris_conv.alpha": np.array(2, np.float32),
    }

    def oracle(tensors: Arrays, extra: Mapping[str, Any]) -> Meaning:
        changes = {}
        for module, own in by_module(tensors).items():
            up, down, mid = own.pop("lora_up.weight"), own.pop("lora_down.weight"), own.pop("lora_mid.weight", None)
            s = float(own.pop("alpha", np.float32(down.shape[0])).item()) / down.shape[0]
            left = up.reshape(up.shape[:2]).astype(np.float64)
            if mid is None:
                change = left @ down.reshape(down.shape[0], -1)
            else:
                change = np.einsum("ab...,oa,bi->oi...", mid, left, down.reshape(down.shape[:2]))
            changes[f"{module}.weight"] = s * change.reshape(SHAPES[f"{module}.weight"])
            if own:
                raise ValueError(f"left over: {sorted(own)}")
        return changes, {}

    return Subject("locon", {"locon.safetensors": save(tensors)}, oracle)


def loha() -> Subject:
    tensors = {
        "lycoris_body_one.hada_w1_a": random(24, 2),
        "lycoris_body_one.hada_w1_b": random(2, 20),
        "lycoris_body_one.hada_w2_a": random(24, 2, seed=1),
        "lycoris_body_one.hada_w2_b": random(2, 20, seed=1),
        "lycoris_body_one.alpha": np.array(3, np.float32),
        "lycoris_conv.hada_w1_a": random(16, 2),
        "lycoris_conv.hada_w1_b": random(2, 108),
        "lycoris_conv.hada_w2_a": random(16, 2, seed=1),
        "lycoris_conv.hada_w2_b": random(2, 108, seed=1),
        "lycoris_conv.alpha": np.array(3, np.float32),
    }

    def oracle(tensors: Arrays, extra: Mapping[str, Any]) -> Meaning:
        changes = {}
        for module, own in by_module(tensors).items():
            w1a, w1b, w2a, w2b = (own.pop(f"hada_w{half}").astype(np.float64) for half in ("1_a", "1_b", "2_a", "2_b"))
            s = float(own.pop("alpha", np.float32(w1b.shape[0])).item()) / w1b.shape[0]
            changes[f"{module}.weight"] = (s * (w1a @ w1b) * (w2a @ w2b)).reshape(SHAPES[f"{module}.weight"])
            if own:
                raise ValueError(f"left over: {sorted(own)}")
        return changes, {}

    return Subject("loha", {"loha.safetensors": save(tensors)}, oracle)


def lokr() -> Subject:
    tensors = {
        "lycoris_body_one.lokr_w1": random(4, 5),
        "lycoris_body_one.lokr_w2_a": random(6, 2),
        "lycoris_body_one.lokr_w2_b": random(2, 4),
        "lycoris_body_one.alpha": np.array(3, np.float32),
        "lycoris_conv.lokr_w1": random(4, 3),
        "lycoris_conv.lokr_w2": random(4, 4, 3, 3),
        "lycoris_conv.alpha": np.array(3, np.float32),
    }

    def oracle(tensors: Arrays, extra: Mapping[str, Any]) -> Meaning:
        changes = {}
        for module, own in by_module(tensors).items():
            w1, s = own.pop("lokr_w1").astype(np.float64), 1.0
            alpha = float(own.pop("alpha", np.float32(0)).item())
            if "lokr_w2" in own:
                w2 = own.pop("lokr_w2").astype(np.float64)
            else:
                left, right = own.pop("lokr_w2_a").astype(np.float64), own.pop("lokr_w2_b")
                w2, s = left @ right, (alpha or right.shape[0]) / right.shape[0]
            change = np.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2)
            if change.shape != SHAPES[f"{module}.weight"] or own:
                raise ValueError(f"shape {change.shape}, left over: {sorted(own)}")
            changes[f"{module}.weight"] = s * change
        return changes, {}

    return Subject("lokr", {"lokr.safetensors": save(tensors)}, oracle)


def sjtu() -> Subject:
    """The whole model's state, as the authors' package saves it."""
    tensors = {}
    for name, tensor in net().state_dict().items():
        adapted = name.startswith(("body.one.", "conv."))
        module, _, leaf = name.rpartition(".")
        tensors[f"model.{module}.base_layer.{leaf}" if adapted else f"model.{name}"] = tensor.numpy()
    for module, (outputs, inputs, *kernel), ranks in (
        ("body.one", (24, 20), (2, 3)),
        ("conv", (16, 12, 3, 3), (3, 2, 2, 3)),
    ):
        tensors[f"model.{module}.flora_layer.param_G"] = random(*ranks)
        for axis, (size, rank) in enumerate(zip((inputs, outputs, *kernel), ranks, strict=True)):
            tensors[f"model.{module}.flora_layer.param_{axis}"] = random(size, rank)

    def oracle(tensors: Arrays, extra: Mapping[str, Any]) -> Meaning:
        changes = {}
        tensors = {
            name.removeprefix("base_model.model.").removeprefix("model."): tensor for name, tensor in tensors.items()
        }
        for module in MODULES:
            core = tensors.pop(f"{module}.flora_layer.param_G", None)
            if core is None:
                continue
            total = core.astype(np.float64)
            for axis in range(core.ndim):
                factor = tensors.pop(f"{module}.flora_layer.param_{axis}").astype(np.float64)
                total = np.moveaxis(np.tensordot(factor, total, (1, axis)), 0, axis)
            changes[f"{module}.weight"] = 0.5 * total.swapaxes(0, 1)
        whole = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}
        state = {name: tensor.numpy() for name, tensor in net().state_dict().items()}
        trained = {name: tensor for name, tensor in whole.items() if not np.array_equal(tensor, state.get(name))}  # type: ignore[arg-type]
        # A copy of an adapted weight is recorded as a digest, of float16 values: the base's own up to that.
        return changes, {name: tensor for name, tensor in trained.items() if name not in changes}

    return Subject("flora-sjtu", {"flora.safetensors": save(tensors)}, oracle, scale=0.5)


def peft_dense() -> list[Subject]:
    """PEFT's methods that are no plain pair of factors, on body.one (24, 20)."""
    return [
        dense_subject("c3a", {"block_size": 4}, {"c3a_kernel": random(6, 5, 4)}, c3a),
        dense_subject(
            "fourierft", {"random_loc_seed": 7, "scaling": 30.0}, {"fourierft_spectrum": random(40)}, fourierft
        ),
        dense_subject(
            "shira",
            {},
            {
                "shira_weight": random(30),
                "shira_indices": np.stack([np.arange(30) % 24, np.arange(30) % 19]).astype(np.int32),
            },
            shira,
        ),
        dense_subject(
            "gralora",
            {"alpha": 3, "r": 2, "hybrid_r": 1},
            {
                "gralora_A": random(2, 10, 2),
                "gralora_B": random(2, 2, 12),
                "gralora_A_general.weight": random(1, 20),
                "gralora_B_general.weight": random(24, 1),
            },
            gralora,
        ),
        dense_subject(
            "randlora",
            {"r": 8, "randlora_alpha": 4},
            {
                "randlora_lambda": random(8, 3),
                "randlora_gamma": random(3, 20),
                "randlora_A": random(8, 1, 20),
                "randlora_B": random(24, 3, 8),
            },
            randlora,
        ),
        dense_subject(
            "vblora",
            {"topk": 2},
            {
                "vblora_logits_A_topk_indices": np.stack([np.arange(10) % 9, np.arange(3, 13) % 9], -1).reshape(
                    2, 5, 2
                ),
                "vblora_logits_A_topk_weights": random(2, 5, 1),
                "vblora_logits_B": random(6, 2, 9),
                "base_model.vblora_vector_bank": random(9, 4),
            },
            vblora,
        ),
    ]


def dense_subject(
    name: str, config: dict[str, Any], tensors: Arrays, change: Callable[[Arrays, Mapping[str, Any]], np.ndarray]
) -> Subject:
    """A PEFT directory with one module; the formula pops the tensors that it knows and gives the change."""
    prefix = "base_model.model."
    tensors = tensors | {f"{prefix}head.weight": random(7, 20), f"{prefix}head.bias": random(7)}
    keys = {key if "model" in key else f"{prefix}body.one.{key}": tensor for key, tensor in tensors.items()}

    def oracle(tensors: Arrays, extra: Mapping[str, Any]) -> Meaning:
        plain = {key.replace(prefix, "").replace(".base_layer.", "."): tensor for key, tensor in tensors.items()}
        shared = {key: plain.pop(key) for key in list(plain) if key.startswith("base_model.")}
        changes = {}
        for module in MODULES:
            own = {
                key.removeprefix(f"{module}."): plain.pop(key) for key in list(plain) if key.startswith(f"{module}.")
            }
            if own:
                own |= shared
                changes[f"{module}.weight"] = change(own, extra["config"])
                if own or changes[f"{module}.weight"].shape != SHAPES[f"{module}.weight"]:
                    raise ValueError(f"left over: {sorted(own)}")
        return changes, plain

    files = {
        "adapter_model.safetensors": save(keys),
        "adapter_config.json": json.dumps({"peft_type": name.upper(), **config}).encode(),
    }
    return Subject(f"peft-{name}", files, oracle)


def c3a(own: Arrays, config: Mapping[str, Any]) -> np.ndarray:
    kernel = own.pop("c3a_kernel").astype(np.float64)
    block = kernel.shape[2]
    rows = [np.concatenate([_circulant(kernel[m, n]) for n in range(20 // block)], 1) for m in range(24 // block)]
    return np.concatenate(rows) / 20


def _circulant(first: np.ndarray) -> np.ndarray:
    return np.stack([np.roll(first, row) for row in range(len(first))])


def fourierft(own: Arrays, config: Mapping[str, Any]) -> np.ndarray:
    spectrum = own.pop("fourierft_spectrum")
    seed = torch.Generator().manual_seed(config["random_loc_seed"])
    places = torch.randperm(480, generator=seed)[: len(spectrum)].numpy()
    frequencies = np.zeros(480)
    frequencies[places] = spectrum
    change: np.ndarray = np.fft.ifft2(frequencies.reshape(24, 20)).real * config["scaling"]
    return change


def shira(own: Arrays, config: Mapping[str, Any]) -> np.ndarray:
    change = np.zeros((24, 20))
    for value, row, column in zip(own.pop("shira_weight"), *own.pop("shira_indices"), strict=True):
        change[int(row), int(column)] += value
    return change


def gralora(own: Arrays, config: Mapping[str, Any]) -> np.ndarray:
    a, b = own.pop("gralora_A").astype(np.float64), own.pop("gralora_B").astype(np.float64)
    count, each = len(a), a.shape[2] // len(a)
    change = np.zeros((24, 20))
    for j in range(count):
        for n in range(count):
            block = b[j][n * each : (n + 1) * each].T @ a[n][:, j * each : (j + 1) * each].T
            change[j * 24 // count : (j + 1) * 24 // count, n * 20 // count : (n + 1) * 20 // count] = block
    if config["hybrid_r"]:
        down = own.pop("gralora_A_general.weight").astype(np.float64)
        change += own.pop("gralora_B_general.weight") @ down
    result: np.ndarray = change * config["alpha"] / (a.shape[2] + config["hybrid_r"])
    return result


def randlora(own: Arrays, config: Mapping[str, Any]) -> np.ndarray:
    scales, inner = own.pop("randlora_lambda").astype(np.float64), own.pop("randlora_gamma")
    small, large = own.pop("randlora_A"), own.pop("randlora_B")
    rows = (scales[:, :, None] * small[:, :, :20] * inner).reshape(-1, 20)
    result: np.ndarray = large[:24, : len(inner)].reshape(24, -1) @ rows * config["randlora_alpha"] / config["r"]
    return result


def vblora(own: Arrays, config: Mapping[str, Any]) -> np.ndarray:
    bank = own.pop("base_model.vblora_vector_bank").astype(np.float64)
    indices, weights = (
        own.pop("vblora_logits_A_topk_indices"),
        own.pop("vblora_logits_A_topk_weights").astype(np.float64),
    )
    weights = np.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], -1)
    down = (weights[..., None] * bank[indices.astype(int)]).sum(-2).reshape(len(indices), -1)
    logits = own.pop("vblora_logits_B").astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    kept = np.where(logits >= np.sort(logits, -1)[..., -config["topk"], None], np.exp(logits), 0)
    up = (kept / kept.sum(-1, keepdims=True)) @ bank
    result: np.ndarray = up.transpose(0, 2, 1).reshape(24, -1) @ down
    return result
