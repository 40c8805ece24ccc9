"""`detail` subtracts a binomial blur for any number of channels, up to the border."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dqtool.core.detail import detail


def test_detail_is_what_a_binomial_blur_takes_away() -> None:
    x = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).expand(3, 1, 3, 3) / 16
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    assert torch.allclose(detail(x), x - blurred, atol=1e-6)
    assert torch.allclose(detail(torch.full((1, 1, 4, 4), 3.0)), torch.zeros(1, 1, 4, 4), atol=1e-6)
