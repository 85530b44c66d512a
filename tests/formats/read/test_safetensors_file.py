import numpy as np
import pytest
import torch
from safetensors import deserialize
from safetensors.torch import save

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.read.safetensors_file import read_tensors


def test_every_dtype_of_a_training_run_is_read_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, generator=generator)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    data = save({str(d): values.to(d) for d in dtypes} | {"steps": torch.tensor(7)}, metadata={"format": "pt"})
    tensors, metadata = read_tensors(data, source="a test")
    for dtype in dtypes:
        expected = values.to(dtype)
        wide = expected.float() if dtype == torch.bfloat16 else expected
        np.testing.assert_array_equal(tensors[str(dtype)], wide.numpy())
    assert tensors["steps"].shape == ()
    assert tensors["steps"] == 7
    assert metadata == {"format": "pt"}


def test_a_dtype_that_numpy_cannot_hold_is_refused() -> None:
    data = save({"w": torch.zeros(2, dtype=torch.float8_e4m3fn)})
    with pytest.raises(FormatError, match="F8_E4M3"):
        read_tensors(data, source="a test")


def test_a_tensor_that_is_named_twice_is_refused() -> None:
    # The safetensors package reads the last one and says nothing.
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"w":{entry},"w":{entry}}}'.encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    assert deserialize(data)  # type: ignore[no-untyped-call]
    with pytest.raises(FormatError, match="'w' stands there twice"):
        read_tensors(data, source="a test")


def test_tensors_can_be_written_to() -> None:
    tensors, _ = read_tensors(save({"w": torch.zeros(2)}), source="a test")
    assert tensors["w"].flags.writeable
