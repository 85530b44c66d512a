import numpy as np
import pytest
import torch
from safetensors.torch import save

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.tensors import read_tensors


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
