"""Damaged files: every one ends in an error of ours, or in the very adapter that the damaged file describes.

Names and ranks are checked against the base, so that a renamed tensor cannot pass for another weight.  What no format
can tell is a flipped bit in a value that stays finite: then the adapter must have that value.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.hostile.subjects import Meaning, Subject, meaning, net, subjects
from tpeft_deploy import Adapter
from tpeft_deploy.errors import TpeftError
from tpeft_deploy.formats import load_adapter

SUBJECTS = subjects()
BASE = net()
Random = np.random.Generator
FOUND = [("lokr", 1423), ("flora-sjtu", 17), ("peft-lora", 1102)]  # (subject, seed) of mutations that once went wrong


def flip(data: bytes, random: Random) -> bytes:
    """A few bits, in the header as likely as in the values."""
    changed = bytearray(data)
    limit = len(data) if random.random() < 0.5 else min(len(data), 8 + int.from_bytes(data[:2], "little"))
    for _ in range(random.integers(1, 4)):
        changed[random.integers(limit)] ^= 1 << random.integers(8)
    return bytes(changed)


def truncate(data: bytes, random: Random) -> bytes:
    return data[: random.integers(len(data))]


def splice(data: bytes, random: Random) -> bytes:
    """Some bytes taken out, put in, or doubled."""
    start, length = int(random.integers(len(data))), int(random.integers(1, 64))
    middle = [b"", random.bytes(length), data[start : start + length] * 2][random.integers(3)]
    return data[:start] + middle + data[start + length :]


def header_of(data: bytes) -> tuple[dict[str, dict[str, object]], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: object, values: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


def rename(data: bytes, random: Random) -> bytes:
    header, values = header_of(data)
    name = str(random.choice([key for key in header if key != "__metadata__"]))
    place = int(random.integers(len(name)))
    new = [
        name[:place] + chr(int(random.integers(32, 127))) + name[place + 1 :],
        name[:place] + name[place + 1 :],
        name.replace("one", "two"),
        name.replace("_A", "_B").replace("w1", "w2").replace("up", "down"),
        name + ".weight",
        name.rpartition(".")[0],
        "base_model.model." + name,
        name.replace("body", "body.base_layer", 1),
    ][random.integers(8)]
    return with_header({new if key == name else key: entry for key, entry in header.items()}, values)


def swap(data: bytes, random: Random) -> bytes:
    """The names of two tensors exchanged."""
    header, values = header_of(data)
    one, other = random.choice([key for key in header if key != "__metadata__"], 2, replace=False)
    header[one], header[other] = header[other], header[one]
    return with_header(header, values)


def declare(data: bytes, random: Random) -> bytes:
    """Another shape, dtype or place in the file than the tensor has."""
    header, values = header_of(data)
    entry = header[str(random.choice([key for key in header if key != "__metadata__"]))]
    shape = list(entry["shape"])  # type: ignore[call-overload]
    huge = int(2 ** random.integers(31, 80))
    match random.integers(7):
        case 0:
            entry["shape"] = [huge, *shape]
        case 1:
            entry["shape"] = shape[::-1]
        case 2:
            entry["shape"] = [huge, 0]
        case 3:
            entry["data_offsets"] = [0, huge]
        case 4:
            entry["dtype"] = ["F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3"][random.integers(7)]
            entry["shape"] = [*shape, 2] if random.random() < 0.5 else shape
        case 5:
            entry["shape"] = [-1, *shape] if random.random() < 0.5 else [1.0 * size for size in shape]
        case _:
            entry["shape"] = [1, *shape] if random.random() < 0.5 else [int(np.prod(shape))]
    return with_header(header, values)


def drop(data: bytes, random: Random) -> bytes:
    """A file that is whole, with one tensor less."""
    from safetensors.numpy import load, save

    header, _ = header_of(data)
    metadata = header.get("__metadata__")
    tensors = load(data)
    del tensors[str(random.choice(list(tensors)))]
    return save(tensors, metadata=metadata)  # type: ignore[arg-type]


MUTATIONS: list[Callable[[bytes, Random], bytes]] = [flip, truncate, splice, rename, swap, declare, drop]


def mutate(subject: Subject, seed: int) -> dict[str, bytes]:
    random = np.random.default_rng(seed)
    files = dict(subject.files)
    name = str(random.choice(list(files)))
    allowed = MUTATIONS if name.endswith(".safetensors") else MUTATIONS[:3]
    files[name] = allowed[random.integers(len(allowed))](files[name], random)
    return files


def store(files: Mapping[str, bytes], place: Path) -> Path:
    for name, content in files.items():
        (place / name).write_bytes(content)
    return place / next(iter(files)) if len(files) == 1 else place


def load_mutated(subject: Subject, files: Mapping[str, bytes], place: Path) -> Adapter | None:
    """The adapter, or None where loading ends in an error of ours; anything else is a failure of the test."""
    try:
        return load_adapter(store(files, place), base=BASE, scale=subject.scale)
    except TpeftError:
        return None


def check(name: str, seed: int, place: Path) -> bool:
    """Whether the mutated file was read; raises where it was read as something else than it says."""
    subject = SUBJECTS[name]
    files = mutate(subject, seed)
    adapter = load_mutated(subject, files, place)
    if adapter is not None:
        assert_means(adapter, meaning(subject, files))
    return adapter is not None


def assert_means(adapter: Adapter, expected: Meaning) -> None:
    changes, wholes = expected
    assert set(adapter.deltas) == set(changes)
    assert set(adapter.overrides) == set(wholes)
    assert not adapter.gains
    for name, change in changes.items():
        dense = adapter.deltas[name].dense()
        with np.errstate(over="ignore", invalid="ignore"):
            error, size = np.abs(dense - change).max(), np.abs(change).max()
        assert error <= 1e-4 * size or not np.isfinite(size), name
    for name, array in wholes.items():
        np.testing.assert_array_equal(adapter.overrides[name], array)


@pytest.mark.parametrize("name", SUBJECTS)
def test_an_unharmed_file_means_what_the_oracle_says(name: str, tmp_path: Path) -> None:
    subject = SUBJECTS[name]
    adapter = load_mutated(subject, subject.files, tmp_path)
    assert adapter is not None
    assert_means(adapter, meaning(subject, subject.files))


@pytest.mark.parametrize("name", SUBJECTS)
def test_mutated_files(name: str, tmp_path: Path) -> None:
    read = sum(check(name, seed, tmp_path) for seed in range(50))
    assert 0 < read < 50, "the mutations are either all harmless or all fatal, which tests little"


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SUBJECTS)
def test_ten_thousand_mutated_files(name: str, tmp_path: Path) -> None:
    for seed in range(1000, 1000 + 10_000 // len(SUBJECTS) + 1):
        try:
            check(name, seed, tmp_path)
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}") from error


@pytest.mark.parametrize(("name", "seed"), FOUND)
def test_mutations_that_once_went_wrong(name: str, seed: int, tmp_path: Path) -> None:
    check(name, seed, tmp_path)


@pytest.mark.parametrize("name", SUBJECTS)
def test_memory_stays_in_proportion(name: str, tmp_path: Path) -> None:
    """Within 4 times the files and the base's weights, whatever sizes a header declares."""
    subject = SUBJECTS[name]
    weights = sum(tensor.nbytes for tensor in BASE.state_dict().values())
    load_mutated(subject, subject.files, tmp_path)  # whatever is imported on the way
    for seed in range(2000, 2040):
        files = mutate(subject, seed)
        limit = 4 * (sum(map(len, files.values())) + weights) + 200_000  # objects of Python's own
        tracemalloc.start()
        try:
            load_mutated(subject, files, tmp_path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= limit, f"seed {seed}: {peak} bytes, expected at most {limit}"
