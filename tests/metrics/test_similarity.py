import math

import pytest
import torch

from dqtool.errors import UsageError
from dqtool.metrics.similarity import PSNR_CAP, mse, psnr


def test_values_per_image() -> None:
    a = torch.zeros(3, 1, 4, 4)
    b = a.clone()
    b[1], b[2] = 0.2, 2.0
    assert mse(a, b).tolist() == pytest.approx([0, 0.04, 4])
    assert psnr(a, b, data_range=2).tolist() == pytest.approx([PSNR_CAP, 20, 0], abs=1e-5)
    assert psnr(a, b, data_range=1)[1].item() == pytest.approx(10 * math.log10(25), abs=1e-5)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match="references"):
        psnr(torch.zeros(2, 1, 4, 4), torch.zeros(3, 1, 4, 4), 1)
