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


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
@pytest.mark.parametrize("kind", [RuntimeError, getattr(torch, "AcceleratorError", RuntimeError)])
def test_errors_of_cuda_and_its_libraries_are_known_by_their_text(kind: type[Exception], text: str) -> None:
    assert is_out_of_memory(kind(text))
    assert not is_out_of_memory(kind("CUDA error: an illegal memory access was encountered"))


def test_other_errors_are_not_taken_for_it() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        with_smaller_batches(lambda _batch: (_ for _ in ()).throw(RuntimeError("shapes differ")), 8, "it")
