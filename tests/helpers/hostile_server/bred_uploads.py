"""Uploads that hostile tenants may send, bred from valid ones by mutation and from a grammar, each by a seed.

`breed(seed)` gives the files of one: "weights", the bytes of a safetensors file, and often "config", those of
adapter_config.json.  They are for `tests.helpers.nets.conv_net`.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

Files = dict[str, bytes]
Random = random.Random
_MODULES = {"up": (16, 8), "head": (10, 16), "stem": (12, 1, 4, 4), "depthwise": (12, 1, 5, 5), "grouped": (8, 3, 3, 3)}
_PREFIX = "base_model.model."
_DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "X": 4}

# PEFT's methods for the linear layer `up` (16, 8): tensors, what the configuration adds, and shared tensors.
Sizes = dict[str, tuple[int, ...]]
_COMMON: dict[str, Any] = {"r": 2, "lora_alpha": 2, "alpha": 2, "target_modules": ["up"], "bias": "none"}
_METHODS: dict[str, tuple[Sizes, dict[str, Any], Sizes]] = {
    "LORA": ({"lora_A.weight": (2, 8), "lora_B.weight": (16, 2)}, {}, {}),
    "ADALORA": ({"lora_A": (2, 8), "lora_E": (2, 1), "lora_B": (16, 2)}, {"init_r": 3}, {}),
    "LOHA": ({"hada_w1_a": (16, 2), "hada_w1_b": (2, 8), "hada_w2_a": (16, 2), "hada_w2_b": (2, 8)}, {}, {}),
    "LOKR": ({"lokr_w1": (4, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}, {}, {}),
    "IA3": ({"ia3_l": (16, 1)}, {"feedforward_modules": []}, {}),
    "VERA": (
        {"vera_lambda_b": (16,), "vera_lambda_d": (3,)}, {}, {"base_model.vera_A": (3, 16), "base_model.vera_B": (16,
        3)}
    ),
    "TINYLORA": (
        {"tinylora_A": (2, 8), "tinylora_B": (16, 2), "tinylora_P": (4, 2, 2)}, {}, {"base_model.tinylora_v.0": (4,)}
    ),
    "DELORA": (
        {"delora_A": (2, 8), "delora_B": (16, 2), "delora_lambda": (1,), "delora_w_norm": (8,)}, {}, {}
    ),
    "MISS": ({"miss_block": (2, 16)}, {}, {}),
    "C3A": ({"c3a_kernel": (4, 2, 4)}, {}, {}),
    "FOURIERFT": ({"fourierft_spectrum": (9,)}, {"random_loc_seed": 7, "scaling": 2.0}, {}),
    "WAVEFT": ({"waveft_spectrum": (9,)}, {"random_loc_seed": 7, "scaling": 2.0, "wavelet_family": "db1"}, {}),
    "GRALORA": ({"gralora_A": (2, 4, 2), "gralora_B": (2, 2, 8)}, {"hybrid_r": 0}, {}),
    "RANDLORA": (
        {"randlora_lambda": (2, 4), "randlora_gamma": (4, 8)}, {"randlora_alpha": 2},
        {"base_model.randlora_A": (2, 1, 8), "base_model.randlora_B": (16, 4, 2)},
    ),
    "VBLORA": (
        {"vblora_logits_A": (2, 2, 5), "vblora_logits_B": (4, 2, 5)}, {"topk": 2},
        {"base_model.vblora_vector_bank": (5, 4)}
    ),
    "OFT": ({"oft_R.weight": (2, 6)}, {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5}, {}),
    "BOFT": ({"boft_R": (1, 2, 4, 4), "boft_s": (16, 1)}, {}, {}),
    "HRA": ({"hra_u": (8, 2)}, {}, {}),
    "HIRA": ({"hira_A": (2, 8), "hira_B": (16, 2)}, {}, {}),
    "ROAD": ({"road_theta": (8,), "road_alpha": (8,)}, {"variant": "road_1", "group_size": 8}, {}),
    "GLORA": ({f"glora_{path}.X": (1,) for path in "ABCDE"}, {}, {}),
    "DEFT": ({"deft_P": (16, 2), "deft_R": (2, 8)}, {"decomposition_method": "relu"}, {}),
    "OSF": ({"osf_svd_params.U_low": (16, 2), "osf_svd_params.S_low": (2,), "osf_svd_params.V_low": (2, 8)}, {}, {}),
    "PEANUT": ({"peanut_A.weight": (2, 16), "peanut_B.weight": (16, 2)}, {"depth": 0, "scaling": 1.0,
    "act_fn": "relu"}, {}),
    "SHIRA": ({"shira_weight": (3,), "shira_indices": (2, 3)}, {}, {}),
    "SUPERTUNING": ({"supertuning_values": (3,), "supertuning_indices": (3,)}, {"r": None}, {}),
    "UNILORA": (
        {"unilora_indices_A": (2, 8), "unilora_scales_A": (2, 8), "unilora_indices_B": (16, 2),
        "unilora_scales_B": (16, 2)},
        {"save_indices": True}, {"base_model.unilora_theta_d": (9,)},
    ),
    "BEFT": ({"beft_bias": (1, 16)}, {}, {}),
    "LN_TUNING": ({"ln_tuning_layers.weight": (16,)}, {}, {}),
    "FROD": (
        {"frod_lambda_l": (8,), "frod_lambda_s_values": (3,)}, {},
        {"base_model.frod_V.up": (8, 8), "base_model.frod_s_indices.up": (2, 3), "base_model.frod_s_size.up": (2,)},
    ),
    "TRAINABLE_TOKENS": ({"trainable_tokens_delta": (2, 8)}, {"token_indices": [1, 3]}, {}),
    "TPEFT_TUCKER": ({"tucker_core": (2, 2), "tucker_factor.0": (16, 2), "tucker_factor.1": (8, 2)}, {"scale": 1.0},
    {}),
}  # fmt: skip
# Methods of single files, which have no configuration.
_FILES: dict[str, Sizes] = {
    "kohya": {"up.lora_up.weight": (16, 2), "up.lora_down.weight": (2, 8), "up.alpha": ()},
    "locon": {"grouped.lora_up.weight": (8, 2, 1, 1), "grouped.lora_down.weight": (2, 3, 3, 3), "grouped.alpha": ()},
    "mid": {
        "grouped.lora_up.weight": (8, 2, 1, 1), "grouped.lora_down.weight": (2, 3, 1, 1),
        "grouped.lora_mid.weight": (2, 2, 3, 3), "grouped.alpha": (),
    },
    "plain": {"up.lora_A.weight": (2, 8), "up.lora_B.weight": (16, 2), "up.alpha": ()},
    "loha": {"up.hada_w1_a": (16, 2), "up.hada_w1_b": (2, 8), "up.hada_w2_a": (16, 2), "up.hada_w2_b": (2, 8)},
    "loha-tucker": {
        "grouped.hada_w1_a": (2, 8), "grouped.hada_w1_b": (2, 3), "grouped.hada_w2_a": (2, 8),
        "grouped.hada_w2_b": (2, 3), "grouped.hada_t1": (2, 2, 3, 3), "grouped.hada_t2": (2, 2, 3, 3),
    },
    "lokr": {"up.lokr_w1_a": (4, 2), "up.lokr_w1_b": (2, 2), "up.lokr_w2": (4, 4), "up.alpha": ()},
    "glora": {"up.a1.weight": (8, 2), "up.a2.weight": (2, 8), "up.b1.weight": (16, 2), "up.b2.weight": (2, 8)},
    "diag-oft": {"up.oft_blocks": (4, 4, 4), "up.alpha": ()},
    "ia3": {"up.weight": (16,), "up.on_input": ()},
    "norm": {"layer_norm.w_norm": (8,), "layer_norm.b_norm": (8,)},
    "full": {"up.diff": (16, 8), "up.diff_b": (16,)},
    "dora": {"up.lora_up.weight": (16, 2), "up.lora_down.weight": (2, 8), "up.dora_scale": (16, 1)},
}  # fmt: skip
_PATTERNS = [
    "up", ".*", "(a+)+$", "(a|a)*b", "(.*)*x", r"(\w+\s?)*$", "(?!x)(a*)*c", "(.)\\1", "a{1000}{1000}",
    "((((((up))))))",
    "(" * 500 + ")" * 500, "[", "*", "(?P<a>u)(?P=a)", "(?i)UP", "u(?=p)p", "(?<!x)up", "é|up", "", "^up$", "\\",
    "|" * 50,
    "(?:u|p)*" * 30, "x?" * 40 + "x" * 40, "(.*.*.*.*.*.*)*p", "\\Q", "(?>a)", "a++", "[\\d-\\w]", "\ud800", "up\n",
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 35_000, 10**9, 10**18, 10**400, 1e308, -1e-320, float("nan"), float("inf"), "",
    "up",
    "x" * 300, "é\u202e", "\ud800", [], {}, [[]], [None], ["up"], ["up"] * 50, [0, 1], {"up": 1}, {"up": 10**400},
    {"up": None}, {"": 0}, {"a": {"b": {"c": []}}}, "all-linear", "pissa", "olora", "bat", "relu", "qr", "LORA", "IA3",
]  # fmt: skip
_FIELDS = [
    "peft_type", "r", "lora_alpha", "alpha", "init_r", "rank_pattern", "alpha_pattern", "target_modules",
    "feedforward_modules", "target_parameters", "modules_to_save", "layers_pattern", "exclude_modules", "bias",
    "init_lora_weights", "init_weights", "use_rslora", "fan_in_fan_out", "topk", "hybrid_r", "random_loc_seed",
    "scaling",
    "token_indices", "trainable_token_indices", "weight_tying", "depth", "act_fn", "coft", "eps", "block_share",
    "use_cayley_neumann", "num_cayley_neumann_terms", "group_size", "variant", "decomposition_method", "para", "scale",
    "base_digests", "apply_GS", "use_idwt", "wavelet_family", "randlora_alpha", "save_indices",
]  # fmt: skip
_STARTS = ["", "a.", "a." * 300, "up.", _PREFIX, "lora_unet_"]
_ENDS = ["", *(f".{name}" for name in ("lora_A.weight", "lora_up.weight", "diff", "weight", "hada_w1_a", "base_layer"))]
_SIZES = [0, 1, 1, 2, 3, 8, 16, 100, 35_000, 2**20, 2**31, 2**40, 2**63, -1]


def breed(seed: int) -> Files:
    """The upload of a seed."""
    choose = Random(seed)
    files = dict(choose.choice(_valid()))
    kind = choose.random()
    if kind < 0.45:
        return _mutated(files, choose)
    if kind < 0.7:
        return _claimed(choose)
    if kind < 0.9:
        return {"weights": files["weights"], "config": _config(files.get("config"), choose)}
    return {"weights": _odd_header(choose)} | ({"config": files["config"]} if "config" in files else {})


def _numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if "indices" in name:
        return np.arange(int(np.prod(shape))).reshape(shape) % 8
    if "frod_s_size" in name:
        return np.array([8, 8])
    if "on_input" in name:
        return np.array(0.0, np.float32)
    values = np.random.default_rng(len(name)).standard_normal(shape)
    return np.asarray(values, np.float32)


@functools.cache
def _valid() -> list[Files]:
    from tests.helpers import nets

    own = nets.adapter_for(nets.conv_net()[0], {"up.weight": (2, 2), "stem.weight": (2, 1, 2, 2)}, seed=1)
    found: list[Files] = [{"weights": own.to_bytes()}]
    for kind, (tensors, fields, shared) in _METHODS.items():
        named = {f"{_PREFIX}up.{name}": _numbers(name, shape) for name, shape in tensors.items()}
        named |= {name: _numbers(name, shape) for name, shape in shared.items()}
        config = _COMMON | {"peft_type": kind} | fields
        found.append({"weights": save(named), "config": json.dumps(config).encode()})
    alone = ({name: _numbers(name, shape) for name, shape in names.items()} for names in _FILES.values())
    return [*found, *({"weights": save(tensors)} for tensors in alone)]


def _mutated(files: Files, choose: Random) -> Files:
    for _ in range(choose.choice([1, 1, 2, 3])):
        name = choose.choice(sorted(files))
        change = choose.choice(_CHANGES if name == "weights" else [_flip, _splice, _nest])
        files[name] = change(files[name], choose)
    return files


def _flip(data: bytes, choose: Random) -> bytes:
    changed = bytearray(data or b"x")
    limit = len(changed) if choose.random() < 0.5 else min(len(changed), 400)
    for _ in range(choose.randint(1, 4)):
        changed[choose.randrange(limit)] ^= 1 << choose.randrange(8)
    return bytes(changed)


def _splice(data: bytes, choose: Random) -> bytes:
    start, length = choose.randrange(len(data) + 1), choose.randint(1, 60)
    middle = choose.choice([b"", choose.randbytes(length), data[start : start + length] * choose.choice([2, 2, 300])])
    return data[:start] + middle + data[start + length :]


def _nest(data: bytes, choose: Random) -> bytes:
    depth = choose.choice([10, 900, 1100, 100_000])
    opening, closing = choose.choice([(b"[", b"]"), (b'{"a":', b"}")])
    value = opening * depth + b"1" + closing * depth * choose.randint(0, 1)
    return data[:1] + b'"' + choose.choice([b"r", b"x", b"target_modules"]) + b'":' + value + b"," + data[1:]


def _header_change(data: bytes, choose: Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        key = choose.choice([name for name in header if name != "__metadata__"])
        entry = header[key]
        shape = list(entry["shape"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return _flip(data, choose)
    match choose.randrange(8):
        case 0:
            entry["shape"] = [choose.choice(_SIZES) for _ in shape]
        case 1:
            entry["shape"], entry["data_offsets"] = [choose.choice(_SIZES), 0], [0, 0]
        case 2:
            entry["dtype"] = choose.choice(list(_DTYPES))
        case 3:
            entry["data_offsets"] = [choose.choice(_SIZES), choose.choice(_SIZES)]
        case 4:
            entry["shape"] = choose.choice([shape[::-1], [1] * 70, [1, *shape], [], None, "8", [8.0], shape * 2])
        case 5:
            header |= {f"{key}{number}": entry for number in range(choose.choice([1, 50, 500]))}
        case 6:
            header[_name(choose, key)] = header.pop(key)
        case _:
            header["__metadata__"] = {"tpeft": json.dumps(choose.choice(_VALUES)), "x": choose.choice([1, "y"])}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _name(choose: Random, key: str) -> str:
    return choose.choice(
        [
            key.replace("up", choose.choice(list(_MODULES))),
            key + ".weight",
            "a." * choose.choice([5, 900, 5000]) + key,
            key.replace(".", "_"),
            f"{_PREFIX}{key}",
            key.replace("up", "up" + ".base_layer" * choose.choice([1, 2, 80])),
            "é\u202e\x00" + key,
            "lora_unet_" + key,
            "",
            key.replace("lora", "hada"),
        ]
    )


_CHANGES: list[Callable[[bytes, Random], bytes]] = [_flip, _splice, _header_change, _header_change, _header_change]


def _claimed(choose: Random) -> Files:
    """A well-formed file of a method, with sizes of another weight or rank, or of none, all of them alike or not."""
    if choose.random() < 0.7:
        kind = choose.choice(list(_METHODS))
        tensors, fields, shared = _METHODS[kind]
        module = choose.choice([*_MODULES, "up", "up", "up"])
        sizes = {f"{_PREFIX}{module}.{name}": shape for name, shape in tensors.items()} | shared
        config = _COMMON | {"peft_type": kind} | fields
    else:
        sizes, config = dict(_FILES[choose.choice(list(_FILES))]), {}
    old, new = choose.choice([1, 2, 2, 2, 3, 4, 8, 16]), choose.choice([0, 0, 1, 2, 5, 64, 500, 5000, 60_000, 2**40])
    if choose.random() < 0.5:
        config["r"] = new
    grown = {name: tuple(new if size == old else size for size in shape) for name, shape in sizes.items()}
    if choose.random() < 0.4:
        one = choose.choice(list(grown))
        grown = sizes | {one: tuple(choose.choice([size, new, 0, 1]) for size in grown[one])}
    weights = _declared(grown, choose, limit=choose.choice([10_000, 10_000, 10_000, 1_000_000]))
    return {"weights": weights} | ({"config": json.dumps(config).encode()} if config else {})


def _declared(sizes: Mapping[str, tuple[int, ...]], choose: Random, *, limit: int) -> bytes:
    """A whole file where it is within the limit; else the sizes of a tensor are cut until it is."""
    header, place = {}, 0
    dtype = choose.choice(["F32", "F32", "F16", "BF16", "F64"])
    for name, found in sizes.items():
        shape, own = list(found), "I64" if "indices" in name or "s_size" in name else dtype
        while (total := math.prod(shape) * _DTYPES[own]) + place > limit and max(shape, default=0) > 2:
            shape[shape.index(max(shape))] = choose.choice([0, 1, 2])
        header[name] = {"dtype": own, "shape": shape, "data_offsets": [place, place + total]}
        place += total
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + _values()[:place]


@functools.cache
def _values() -> bytes:
    return np.full(300_000, 0.01, np.float32).tobytes()


def _config(data: bytes | None, choose: Random) -> bytes:
    """A configuration whose fields have patterns and values of every kind, some of them twice."""
    config = json.loads(data or b'{"peft_type": "LORA", "r": 2}')
    for _ in range(choose.choice([1, 1, 2, 4])):
        field = choose.choice([*_FIELDS, "alpha_pattern", "rank_pattern", "feedforward_modules", "target_modules"])
        if field.endswith("_pattern") and choose.random() < 0.7:
            count = choose.choice([1, 1, 3, 20, 300])
            chosen = (choose.choice(_PATTERNS) + choose.choice(["", str(n)]) for n in range(count))
            config[field] = {pattern: choose.choice([2, 2, *_VALUES]) for pattern in chosen}
        elif field.endswith("modules") and choose.random() < 0.7:
            config[field] = choose.choice([choose.choice(_PATTERNS), [choose.choice(_PATTERNS)]])
        else:
            config[field] = choose.choice(_VALUES)
    text = json.dumps(config)
    if choose.random() < 0.1:
        text = (
            text[:-1] + f', "{choose.choice(_FIELDS)}": {choose.choice(["1", "1e999", "9" * 5000, "-0", "NaN"])}' + "}"
        )
    return text.encode()


def _odd_header(choose: Random) -> bytes:
    """A header of many names, long ones, or some twice."""
    start, count = choose.choice(_STARTS), choose.choice([1, 2, 30, 30, 300, 300, 3000])
    end = choose.choice(_ENDS)
    shape = choose.choice([[0], [0, 35_000], [], [1], [0, 0]])
    size = 0 if 0 in shape else 4
    entry = json.dumps({"dtype": "F32", "shape": shape, "data_offsets": [0, size]})
    numbers = [n % 7 if count < 30 else n for n in range(min(count, 500_000 // len(start + end + entry)))]
    middle = choose.choice(["a", "m.n", "é", ""])
    names = [f"{start}{middle}{number}{end}" for number in numbers]
    text = ("{" + ", ".join(f"{json.dumps(name)}: {entry}" for name in names) + "}").encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * size
