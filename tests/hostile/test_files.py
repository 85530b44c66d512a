"""Hostile files: reading costs what they hold, not what they claim, and ends in an adapter or an error of ours."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import nets
from tests.helpers.counting import operations
from tests.helpers.hostile_server.bred_uploads import breed
from tpeft_deploy import Adapter, Bundle, TuckerDelta
from tpeft_deploy.errors import AdapterError, FormatError, ShapeError, TpeftError
from tpeft_deploy.formats import load_adapter

BASE = nets.conv_net()[0]
PEFT = "base_model.model.up."
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}


def store(place: Path, weights: bytes, config: bytes | None = None) -> Path:
    for file in place.iterdir():
        file.unlink()
    (place / "adapter_model.safetensors").write_bytes(weights)
    if config is None:
        return place / "adapter_model.safetensors"
    (place / "adapter_config.json").write_bytes(config)
    return place


def declared(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A safetensors file of these shapes, with values of 0.01."""
    header, values = {}, b""
    for name, shape in shapes.items():
        data = np.full(shape, 0.01, np.float32).tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(values), len(values) + len(data)]}
        values += data
    return framed(json.dumps(header).encode(), values)


def framed(header: bytes, values: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + values


def read(path: Path) -> Adapter | str:
    """The adapter, or the text of the refusal."""
    try:
        return load_adapter(path, base=BASE)
    except TpeftError as error:
        text = str(error)
        assert "\n" not in text
        assert len(text.encode()) <= 40_000
        return text


def peak_of(path: Path) -> int:
    tracemalloc.start()
    try:
        read(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def check_bred(seeds: Iterable[int], place: Path) -> Counter[str]:
    found = Counter[str]()
    read(store(place, **breed(1)))  # whatever is imported on the way
    for seed in seeds:
        files = breed(seed)
        path = store(place, **files)
        try:
            found[type(read(path)).__name__] += 1
            peak = peak_of(path)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        size = sum(map(len, files.values()))
        assert peak <= 30 * size + 2_000_000, f"seed {seed}: {peak} bytes for {size}"
    return found


def test_bred_uploads_are_read_or_refused_within_their_size(tmp_path: Path) -> None:
    found = check_bred(range(300), tmp_path)
    assert found["Adapter"] > 30
    assert found["str"] > 100


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_thousand_bred_uploads(tmp_path: Path) -> None:
    check_bred(range(1000, 21_000), tmp_path)


def test_breeding_is_repeatable_and_small() -> None:
    sizes = [sum(map(len, breed(seed).values())) for seed in range(300)]
    assert [breed(seed) for seed in range(20)] == [breed(seed) for seed in range(20)]
    assert max(sizes) < 1_500_000
    assert sorted(sizes)[200] < 10_000


# Tensors of a module that claim a rank of 35,000 or more, within a file of a few megabytes.
R = 35_000
CLAIMS: list[tuple[str, dict[str, tuple[int, ...]], dict[str, Any] | None]] = [
    ("zeros", {f"{PEFT}lora_A.weight": (R, 0), f"{PEFT}lora_B.weight": (0, R)}, LORA | {"r": R}),
    ("zeros-kohya", {"up.lora_down.weight": (R, 0), "up.lora_up.weight": (0, R)}, None),
    ("lora", {f"{PEFT}lora_A.weight": (R, 8), f"{PEFT}lora_B.weight": (16, R)}, LORA | {"r": R}),
    ("lora-of-another", {f"{PEFT}lora_A.weight": (1, R), f"{PEFT}lora_B.weight": (R, 1)}, LORA | {"r": 1}),
    ("kohya", {"up.lora_down.weight": (R, 8), "up.lora_up.weight": (16, R)}, None),
    ("lokr", {"up.lokr_w1_a": (4, R), "up.lokr_w1_b": (R, 2), "up.lokr_w2": (4, 4)}, None),
    ("lokr-of-another", {"up.lokr_w1": (R, 1), "up.lokr_w2": (1, R)}, None),
    ("loha", {f"up.hada_w{i}_{x}": s for i in (1, 2) for x, s in (("a", (R, 1)), ("b", (1, R)))}, None),
    ("loha-tucker", {f"grouped.hada_{x}": s for i in (1, 2) for x, s in (
        (f"w{i}_a", (5000, 8)), (f"w{i}_b", (1, 3)), (f"t{i}", (5000, 1, 3, 3)))}, None),
    ("glora", {"up.a1.weight": (8, R), "up.a2.weight": (R, 8), "up.b1.weight": (16, 1), "up.b2.weight": (1, 8)}, None),
    ("glora-of-another", {"up.a1.weight": (8, 1), "up.a2.weight": (1, 8), "up.b1.weight": (R, 1),
                          "up.b2.weight": (1, R)}, None),
    ("miss", {f"{PEFT}miss_block": (R, 1)}, {"peft_type": "MISS", "r": R}),
    ("adalora", {f"{PEFT}lora_A": (R, 8), f"{PEFT}lora_E": (R, 1), f"{PEFT}lora_B": (16, R)},
     {"peft_type": "ADALORA", "init_r": R, "lora_alpha": 1}),
    ("delora", {f"{PEFT}delora_A": (R, 8), f"{PEFT}delora_B": (16, R), f"{PEFT}delora_lambda": (1,),
                f"{PEFT}delora_w_norm": (8,)}, {"peft_type": "DELORA"}),
    ("delora-broadcast", {f"{PEFT}delora_A": (1, R), f"{PEFT}delora_B": (16, 1), f"{PEFT}delora_lambda": (1,),
                          f"{PEFT}delora_w_norm": (R, 1)}, {"peft_type": "DELORA"}),
    ("vera", {f"{PEFT}vera_lambda_b": (16,), f"{PEFT}vera_lambda_d": (R,), "base_model.vera_A": (R, 8),
              "base_model.vera_B": (16, R)}, {"peft_type": "VERA"}),
    ("vblora", {f"{PEFT}vblora_logits_A": (R, 1, 1), f"{PEFT}vblora_logits_B": (1, R, 1),
                "base_model.vblora_vector_bank": (1, R)}, {"peft_type": "VBLORA", "topk": 1}),
    ("oft", {f"{PEFT}oft_R.weight": (2**40, 0)}, {"peft_type": "OFT", "use_cayley_neumann": False}),
    ("deft", {f"{PEFT}deft_P": (16, R)}, {"peft_type": "DEFT", "para": True, "decomposition_method": "relu"}),
    ("peanut", {f"{PEFT}peanut_A.weight": (R, 16), f"{PEFT}peanut_B.weight": (16, R)},
     {"peft_type": "PEANUT", "depth": 0, "scaling": 1.0, "act_fn": "relu"}),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "config"), [claim[1:] for claim in CLAIMS], ids=[claim[0] for claim in CLAIMS])
def test_a_claimed_rank_costs_no_more_than_the_file(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any] | None
) -> None:
    weights = declared(shapes)
    path = store(tmp_path, weights, None if config is None else json.dumps(config).encode())
    assert peak_of(path) <= 15 * len(weights) + 2_000_000


def test_a_rank_above_the_weight_is_read_as_the_change_that_it_is(tmp_path: Path) -> None:
    values = np.random.default_rng(0)
    down, up = values.standard_normal((40, 8)), values.standard_normal((16, 40))
    from safetensors.numpy import save

    weights = save({f"{PEFT}lora_A.weight": down.astype(np.float32), f"{PEFT}lora_B.weight": up.astype(np.float32)})
    adapter = read(store(tmp_path, weights, json.dumps(LORA | {"r": 40, "lora_alpha": 20}).encode()))
    assert isinstance(adapter, Adapter)
    np.testing.assert_allclose(adapter.deltas["up.weight"].dense(), 0.5 * up @ down, rtol=1e-5, atol=1e-5)


HEADERS: dict[str, Callable[[int], bytes]] = {
    "deep names": lambda n: declared({"a." * 400 + str(i): (0,) for i in range(n)}),
    "modules": lambda n: declared({f"m{i}.lora_A.weight": (1, 1) for i in range(n)}),
    "beside a module": lambda n: declared(
        {f"{PEFT}lora_A.weight": (2, 8), f"{PEFT}lora_B.weight": (16, 2)}
        | {"b." * 400 + str(i): (1,) for i in range(n)}
    ),
    "names twice": lambda n: framed(
        b"{"
        + b",".join(b'"a%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % (i % (n - 1)) for i in range(n))
        + b"}"
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_are_read_in_steps_linear_in_their_size(tmp_path: Path, kind: str) -> None:
    costs = []
    for count in (100, 200):
        path = store(tmp_path, HEADERS[kind](count), json.dumps(LORA).encode())
        read(path)
        costs.append(operations(lambda path=path: read(path)))  # type: ignore[misc]
    assert costs[1] < 2.3 * costs[0]


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (json.dumps({"a." * 2000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode(), "4000 letters"),
        (b'{"a":' + b"9" * 5000 + b"}", "not one"),
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}', "stands there twice"),
        (b"[]", "not one"),
        (b'{"__metadata__":{"tpeft":"' + b"[" * 5000 + b'"}}', "none that can be read"),
    ],
)
def test_odd_headers(tmp_path: Path, header: bytes, told: str) -> None:
    found = read(store(tmp_path, framed(header)))
    assert isinstance(found, str)
    assert told in found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a":' * 5000, "nested too deeply"),
        ('{"r": 1, "r": 2}', "stands there twice"),
        (f'{{"peft_type": "LORA", "r": 2, "lora_alpha": {"9" * 400}}}', "a finite number as lora_alpha"),
        (f'{{"peft_type": "LORA", "r": 2, "lora_alpha": {"9" * 5000}}}', "expected JSON"),
        ('{"peft_type": "LORA", "r": NaN, "lora_alpha": 2}', "a finite number as r"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": Infinity}', "a finite number as lora_alpha"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": "2"}', "a finite number as lora_alpha"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": 5}', "alpha_pattern"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": [5]}', "target_parameters"),
        (f'{{"peft_type": "TPEFT_TUCKER", "scale": {"9" * 400}}}', "a finite number as scale"),
        ('{"peft_type": "\\ud800"}', "peft_type"),
        ('{"peft_type": {}, "x": 1}', "peft_type"),
    ],
)
def test_odd_configurations(tmp_path: Path, text: str, told: str) -> None:
    weights = declared({f"{PEFT}lora_A.weight": (2, 8), f"{PEFT}lora_B.weight": (16, 2)})
    found = read(store(tmp_path, weights, text.encode()))
    assert isinstance(found, str)
    assert told in found


def test_a_pattern_that_re_never_ends_on(tmp_path: Path) -> None:
    weights = declared({f"{PEFT}lora_A.weight": (2, 8), f"{PEFT}lora_B.weight": (16, 2)})
    config = LORA | {"alpha_pattern": {"((([a-z.]+)+)+)+!": 3}}
    assert isinstance(read(store(tmp_path, weights, json.dumps(config).encode())), Adapter)
    with pytest.raises(FormatError, match="a backreference"):
        path = store(tmp_path, weights, json.dumps(LORA | {"rank_pattern": {r"(u)\1": 3}}).encode())
        load_adapter(path, base=BASE)


def test_products_of_a_delta_are_no_larger_than_it_or_its_change() -> None:
    wide = TuckerDelta(np.ones((5000, 1), np.float32), (np.ones((2, 5000), np.float32), np.ones((4000, 1), np.float32)))
    for product in (wide.dense, wide.absorb, wide.norm, wide.narrowed):
        product()
        tracemalloc.start()
        product()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10 * wide.nbytes
    np.testing.assert_array_equal(wide.dense(), np.full((2, 4000), 5000.0))
    assert wide.narrowed().factors[0] is None


class TestFill:
    def test_a_gain_of_single_numbers(self, conv_bundle: Bundle) -> None:
        gain = np.ones((10, 16), np.float32)
        with pytest.raises(ShapeError, match="one factor for each output or each input"):
            conv_bundle.fill(Adapter({}, gains={"head.weight": gain}))

    def test_values_beyond_what_is_computed_in(self, conv_bundle: Bundle) -> None:
        huge = np.full((12, 1, 5, 5), 1e300)
        delta = TuckerDelta(huge, (None,) * 4, 1e300)
        for gains in ({}, {"depthwise.weight": np.full((12, 1, 1, 1), 2.0)}):
            with pytest.raises(AdapterError, match=r"values that float(32|64) holds"):
                conv_bundle.fill(Adapter({"depthwise.weight": delta}, gains=gains))

    def test_a_rank_far_above_the_weight(self, conv_bundle: Bundle) -> None:
        rank = 20_000
        core, up, down = (np.ones(shape, np.float32) for shape in ((rank, 1), (16, rank), (8, 1)))
        adapter = Adapter({"up.weight": TuckerDelta(core, (up, down))})
        tracemalloc.start()
        filled = conv_bundle.fill(adapter)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12 * adapter.nbytes
        slots = filled["up.weight:delta"]
        np.testing.assert_allclose(slots["down"] @ slots["up"], np.full((8, 16), rank))
