"""Small adapters whose change is a product with the base weight, and what their files mean by formulas of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.helpers.hostile.subjects import MODULES, Arrays, Meaning, Subject, by_module, net, peft_files, random

__all__ = ["base_products"]

Formula = Callable[[Arrays, np.ndarray, Mapping[str, Any]], Any]  # a module's tensors, W (O, -1), config -> W'
STATE: Arrays = {name: tensor.numpy().astype(np.float64) for name, tensor in net().state_dict().items()}


def base_products() -> tuple[Subject, ...]:
    return (
        oft(),
        boft(),
        hra(),
        hira(),
        road(),
        glora(),
        deft(),
        osf(),
        peanut(),
        miss(),
        frod(),
        lycoris("diag-oft"),
        lycoris("boft"),
    )


def flat(name: str) -> np.ndarray:
    weight = STATE[f"{name}.weight"]
    rows: np.ndarray = weight.reshape(len(weight), -1)
    return rows


def peft(kind: str, tensors: Arrays, config: Mapping[str, Any], adapted: Formula, *, biased: bool = False) -> Subject:
    """A PEFT directory; `adapted` pops what it reads, and with `biased` also sees the bias as one more input."""
    suffixes = {name.split(".", 2 if name.startswith("body") else 1)[-1] for name in tensors}

    def oracle(tensors: Arrays, extra: Mapping[str, Any]) -> Meaning:
        tensors = {name.replace("base_model.model.", "").replace(".base_layer.", "."): t for name, t in tensors.items()}
        changes, wholes = {}, {}
        for module in MODULES:
            own = {s: tensors.pop(f"{module}.{s}") for s in suffixes if f"{module}.{s}" in tensors}
            if not own:
                continue
            weight = flat(module)
            if biased:
                bias = STATE[f"{module}.bias"][:, None]
                both = adapted(own, np.hstack([weight, bias]), extra["config"])
                wholes[f"{module}.bias"] = both[:, -1].astype(np.float32)
                both = both[:, :-1]
            else:
                both = adapted(own, weight, extra["config"])
            if own:
                raise ValueError(f"left over: {sorted(own)}")
            changes[f"{module}.weight"] = (both - weight).reshape(STATE[f"{module}.weight"].shape)
        return changes, wholes | tensors

    return Subject(kind.lower(), peft_files(tensors, {"peft_type": kind} | dict(config)), oracle)


def block_diagonal(blocks: np.ndarray) -> np.ndarray:
    count, size, _ = blocks.shape
    whole = np.zeros((count * size, count * size))
    for place, block in enumerate(blocks):
        whole[place * size : (place + 1) * size, place * size : (place + 1) * size] = block
    return whole


def cayley(skew: np.ndarray) -> np.ndarray:
    identity = np.eye(skew.shape[-1])
    return np.asarray((identity - skew) @ np.linalg.inv(identity + skew))


def oft() -> Subject:
    def adapted(own: Arrays, weight: np.ndarray, config: Mapping[str, Any]) -> Any:
        values = own.pop("oft_R.weight").astype(np.float64)
        size = next(b for b in range(1, 99) if b * (b - 1) // 2 == values.shape[1])
        blocks = []
        for row in values:
            upper = np.zeros((size, size))
            upper[np.triu_indices(size, 1)] = row
            if config["use_cayley_neumann"]:
                raise ValueError("not what this file says")
            blocks.append(cayley(upper - upper.T))
        return weight @ block_diagonal(np.array(blocks)).T

    tensors = {"body.one.oft_R.weight": random(5, 6), "body.three.oft_R.weight": random(6, 6)}
    tensors |= {"head.weight": random(7, 20), "head.bias": random(7)}
    config = {"use_cayley_neumann": False, "coft": False, "block_share": False, "eps": 6e-5}
    return peft("OFT", tensors, config, adapted)


def boft() -> Subject:
    def adapted(own: Arrays, weight: np.ndarray, config: Mapping[str, Any]) -> Any:
        (values,), scale = own.pop("boft_R").astype(np.float64), own.pop("boft_s")
        rotation = block_diagonal(np.array([cayley((block - block.T) / 2) for block in values]))
        return scale.reshape(-1, 1) * (weight @ rotation.T)

    tensors = {"body.one.boft_R": random(1, 5, 4, 4), "body.one.boft_s": random(24, 1)}
    return peft("BOFT", tensors | {"conv.boft_R": random(1, 18, 6, 6), "conv.boft_s": random(1, 16)}, {}, adapted)


def hra() -> Subject:
    def adapted(own: Arrays, weight: np.ndarray, config: Mapping[str, Any]) -> Any:
        for vector in own.pop("hra_u").astype(np.float64).T:
            weight = weight - 2 * np.outer(weight @ vector, vector) / (vector @ vector)
        return weight

    return peft("HRA", {"body.one.hra_u": random(20, 3), "conv.hra_u": random(108, 2)}, {"apply_GS": False}, adapted)


def hira() -> Subject:
    def adapted(own: Arrays, weight: np.ndarray, config: Mapping[str, Any]) -> Any:
        a, b = own.pop("hira_A").astype(np.float64), own.pop("hira_B").astype(np.float64)
        return weight * (1 + b.reshape(b.shape[:2]) @ a.reshape(len(a), -1))

    tensors = {"body.one.hira_A": random(2, 20), "body.one.hira_B": random(24, 2)}
    return peft("HIRA", tensors | {"conv.hira_A": random(3, 12, 3, 3), "conv.hira_B": random(16, 3, 1, 1)}, {}, adapted)


def road() -> Subject:
    def adapted(own: Arrays, weight: np.ndarray, config: Mapping[str, Any]) -> Any:
        theta, alpha = (own.pop(f"road_{name}").reshape(-1).astype(np.float64) for name in ("theta", "alpha"))
        size, per_pair = config["group_size"], {"road_1": 1, "road_2": 2, "road_4": 4}[config["variant"]]
        rotation = np.zeros((len(weight), len(weight)))
        for start in range(0, len(weight), size):
            for place in range(size // 2):
                first, second = start + place, start + place + size // 2
                if per_pair == 1:
                    cosine = sine = [start // 2 + place] * 2
                elif per_pair == 2:
                    cosine = sine = [first, second]
                else:
                    cosine = [start + first, start + second]
                    sine = [start + size + first, start + size + second]
                rotation[first, first], rotation[second, second] = alpha[cosine] * np.cos(theta[cosine])
                rotation[first, second], rotation[second, first] = alpha[sine] * np.sin(theta[sine]) * [-1, 1]
        return rotation @ weight

    tensors = {f"body.one.road_{name}": random(12, seed=len(name)) for name in ("theta", "alpha")}
    tensors |= {f"body.three.road_{name}": random(10, seed=len(name)) for name in ("theta", "alpha")}
    return peft("ROAD", tensors, {"variant": "road_1", "group_size": 4}, adapted, biased=True)


def glora() -> Subject:
    def adapted(own: Arrays, both: np.ndarray, config: Mapping[str, Any]) -> Any:
        weight, bias = both[:, :-1], both[:, -1]
        a, b, c = (
            own.pop(f"glora_{path}.Xd").astype(np.float64) @ own.pop(f"glora_{path}.Xu") for path in ("A", "B", "C")
        )
        d, e = own.pop("glora_D.X"), own.pop("glora_E.X")
        shifted = bias + bias * d + e + (weight @ c)[:, 0]
        return np.hstack([weight + weight * a + b, shifted[:, None]])

    tensors = {"glora_D.X": random(1), "glora_E.X": random(24)}
    tensors |= {f"glora_{path}.Xd": random(rows, 2) for path, rows in (("A", 24), ("B", 24), ("C", 20))}
    tensors |= {f"glora_{path}.Xu": random(2, columns) for path, columns in (("A", 20), ("B", 20), ("C", 1))}
    return peft("GLORA", {f"body.one.{name}": tensor for name, tensor in tensors.items()}, {}, adapted, biased=True)


def deft() -> Subject:
    def adapted(own: Arrays, weight: np.ndarray, config: Mapping[str, Any]) -> Any:
        basis = own.pop("deft_P").astype(np.float64)
        right = {"relu": np.maximum(basis, 0)}[config["decomposition_method"]]
        scale = config["alpha"] / basis.shape[1] if config.get("alpha") else 1
        filled = 0 if config.get("para") else own.pop("deft_R")
        return weight + basis @ (scale * filled - right.T @ weight)

    tensors = {"body.one.deft_P": random(24, 3), "body.one.deft_R": random(3, 20)}
    return peft("DEFT", tensors, {"decomposition_method": "relu", "para": False, "alpha": 2}, adapted)


def osf() -> Subject:
    def adapted(own: Arrays, weight: np.ndarray, config: Mapping[str, Any]) -> Any:
        left, values, right = (own.pop(f"osf_svd_params.{part}_low").astype(np.float64) for part in "USV")
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        kept = len(s) - len(values)
        return (u[:, :kept] * s[:kept]) @ v[:kept] + (left * values) @ right

    tensors = {"U": random(24, 4), "S": random(4), "V": random(4, 20)}
    named = {f"body.one.osf_svd_params.{part}_low": tensor for part, tensor in tensors.items()}
    return peft("OSF", named, {"effective_rank": 16}, adapted)


def peanut() -> Subject:
    def adapted(own: Arrays, weight: np.ndarray, config: Mapping[str, Any]) -> Any:
        acts: dict[str, Callable[[Any], Any]] = {"relu": lambda x: x * (x > 0), "tanh": np.tanh, "linear": lambda x: x}
        act = acts[config["act_fn"]]
        first, last = own.pop("peanut_A.weight").astype(np.float64), own.pop("peanut_B.weight")
        encoder, decoder = own.pop("peanut_encoders.0.weight"), own.pop("peanut_decoders.0.weight")
        before = act(first @ weight)
        return weight + config["scaling"] * last @ (act(decoder @ act(encoder @ before)) + before)

    sizes = {"A": (3, 24), "B": (24, 3), "encoders.0": (3, 3), "decoders.0": (3, 3)}
    tensors = {f"body.one.peanut_{name}.weight": random(*size) for name, size in sizes.items()}
    return peft("PEANUT", tensors, {"act_fn": "relu", "depth": 1, "scaling": 0.5}, adapted)


def miss() -> Subject:
    def adapted(own: Arrays, weight: np.ndarray, config: Mapping[str, Any]) -> Any:
        whole = weight.copy()
        blocks = own.pop("miss_block").astype(np.float64)
        size = blocks.shape[1]
        for row, block in enumerate(blocks):
            for column in range(0, weight.shape[1], size):
                tile = np.s_[row * size : (row + 1) * size, column : column + size]
                whole[tile] += weight[tile] @ block + block
        return whole

    tensors = {"body.one.miss_block": random(6, 4, 4), "body.three.miss_block": random(5, 4, 4)}
    return peft("MISS", tensors, {"r": 4, "init_weights": "bat"}, adapted)


def frod() -> Subject:
    def oracle(tensors: Arrays, extra: Mapping[str, Any]) -> Meaning:
        tensors = {name.replace("base_model.model.", "").replace(".base_layer.", "."): t for name, t in tensors.items()}
        changes = {}
        for module in MODULES:
            if f"{module}.frod_lambda_l" not in tensors:
                continue
            weight, role = flat(module), module.replace(".", "_")
            diagonal, values = (tensors.pop(f"{module}.frod_lambda_{name}") for name in ("l", "s_values"))
            basis, places, _ = (tensors.pop(f"base_model.frod_{name}.{role}") for name in ("V", "s_indices", "s_size"))
            middle = np.diag(diagonal.reshape(-1).astype(np.float64))
            for row, column, value in zip(*places, values.reshape(-1), strict=True):
                middle[row, column] += value
            units = weight @ np.linalg.inv(basis.astype(np.float64)).T
            units /= np.sqrt((units**2).sum(0))
            changes[f"{module}.weight"] = units @ middle @ basis.T - weight
        return changes, tensors

    tensors = {"body.one.frod_lambda_l": random(20), "body.one.frod_lambda_s_values": random(3)}
    files = peft_files(tensors, {"peft_type": "FROD", "save_projection": True})
    shared = {
        "base_model.frod_V.body_one": random(20, 20),
        "base_model.frod_s_indices.body_one": np.array([[0, 3, 19], [1, 3, 0]]),
        "base_model.frod_s_size.body_one": np.array([20, 20]),
    }
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()} | shared
    return Subject("frod", files | {"adapter_model.safetensors": save(tensors)}, oracle)


def lycoris(method: str) -> Subject:
    levels: tuple[int, ...] = () if method == "diag-oft" else (2,)
    tensors = {
        "lycoris_body_one.oft_blocks": random(*levels, 4, 6, 6),
        "lycoris_body_one.alpha": np.array(0.25, np.float32),
        "lycoris_conv.oft_blocks": random(*levels, 4, 4, 4),
        "lycoris_conv.alpha": np.array(0, np.int64),
        "lycoris_conv.rescale": random(16, 1, 1, 1),
    }

    def oracle(tensors: Arrays, extra: Mapping[str, Any]) -> Meaning:
        changes = {}
        for module, own in by_module(tensors).items():
            weight = rows = flat(module)
            skew = own.pop("oft_blocks").astype(np.float64)
            skew = skew - skew.swapaxes(-1, -2)
            longest, length = float(own.pop("alpha").item()) * len(rows), np.linalg.norm(skew.reshape(-1))
            rotations = cayley(-skew * (longest / length if 0 < longest < length else 1))
            if skew.ndim == 3:
                rows = block_diagonal(rotations.swapaxes(1, 2)) @ rows
            else:
                for level, blocks in enumerate(rotations):
                    rows = butterfly(len(rows), blocks.shape[1], level) @ blocked(blocks, rows, level)
            rows = own.pop("rescale", np.ones(1)).reshape(-1, 1) * rows
            if own:
                raise ValueError(f"left over: {sorted(own)}")
            changes[f"{module}.weight"] = (rows - weight).reshape(STATE[f"{module}.weight"].shape)
        return changes, {}

    return Subject(f"lycoris-{method}", {"oft.safetensors": save(tensors)}, oracle)


def butterfly(outputs: int, size: int, level: int) -> np.ndarray:
    """The permutation that puts what stands in blocks back where its half blocks came from."""
    apart = 2**level * (size // 2)
    places = [
        start + place + half * apart
        for start in range(0, outputs, 2 * apart)
        for place in range(apart)
        for half in (0, 1)
    ]
    back = np.zeros((outputs, outputs))
    back[places, np.arange(outputs)] = 1
    return back


def blocked(blocks: np.ndarray, rows: np.ndarray, level: int) -> np.ndarray:
    return np.asarray(block_diagonal(blocks) @ butterfly(len(rows), blocks.shape[1], level).T @ rows)
