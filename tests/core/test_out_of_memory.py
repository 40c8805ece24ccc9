from __future__ import annotations

import pytest
import torch

from dqtool.core.out_of_memory import is_out_of_memory, with_smaller_batches
from dqtool.errors import EnvironmentFault


def test_batches_are_halved_until_they_fit() -> None:
    tried = []

    def work(batch: int) -> int:
        tried.append(batch)
        if batch > 10:
            raise MemoryError
        return batch

    assert with_smaller_batches(work, 64, "it") == 8
    assert tried == [64, 32, 16, 8]


def test_one_sample_that_does_not_fit_is_the_environment_s_fault() -> None:
    def work(_batch: int) -> int:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    with pytest.raises(EnvironmentFault, match="even with 1 samples"):
        with_smaller_batches(work, 3, "it")


def test_other_errors_are_not_taken_for_it() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        with_smaller_batches(lambda _batch: (_ for _ in ()).throw(RuntimeError("shapes differ")), 8, "it")
