from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

from dqtool.artifacts import check_finite, read_header
from dqtool.artifacts.tensorfile import load_tensors, save_tensors
from dqtool.errors import ArtifactError, EnvironmentFault, NumericError

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a.codes": torch.arange(5, dtype=torch.int32),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "half": torch.ones(3, dtype=torch.bfloat16),
}


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_header_matches_the_file(tmp_path: Path):
    file = tmp_path / "x.safetensors"
    save_tensors(file, TENSORS)
    header = read_header(file)
    assert set(header) == set(TENSORS)
    assert header["b.weight"]["dtype"] == "F32" and header["b.weight"]["shape"] == [3, 4]
    assert sum(stop - begin for begin, stop in (e["data_offsets"] for e in header.values())) == 48 + 20 + 8 + 6


def test_save_load_save_is_byte_identical_whatever_the_order_and_layout(tmp_path: Path):
    first, second, third = (tmp_path / name for name in ("1", "2", "3"))
    save_tensors(first, TENSORS)
    save_tensors(second, load_tensors(first))
    strided = {name: TENSORS[name].clone() for name in reversed(TENSORS)}
    strided["b.weight"] = strided["b.weight"].t().contiguous().t()
    save_tensors(third, strided)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()


def test_tensors_that_share_memory_or_need_grad_are_saved(tmp_path: Path):
    base = torch.arange(10, dtype=torch.float32, requires_grad=True)
    save_tensors(tmp_path / "x", {"all": base, "tied": base, "part": base[2:5]})
    loaded = load_tensors(tmp_path / "x")
    assert torch.equal(loaded["tied"], base) and torch.equal(loaded["part"], base[2:5])


def test_truncated_at_any_length(tmp_path: Path):
    file = tmp_path / "x.safetensors"
    save_tensors(file, TENSORS)
    whole = file.read_bytes()
    for size in (0, 7, 8, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=r"x\.safetensors"):
            read_header(file)
        with pytest.raises(ArtifactError, match=r"x\.safetensors"):
            load_tensors(file)


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04" + b"\0" * 50,
        b"\xff" * 64,
        raw(b"{"),
        raw([]),
        raw({"a": 1}),
        raw({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
        raw({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        raw({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4),
        raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
        raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 5),
    ],
)
def test_foreign_files(tmp_path: Path, content: bytes):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"x\.safetensors") as caught:
        read_header(file)
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory(tmp_path: Path):
    with pytest.raises(EnvironmentFault, match="no such file"):
        read_header(tmp_path / "missing")
    with pytest.raises(EnvironmentFault, match="no such file"):
        load_tensors(tmp_path / "missing")
    with pytest.raises(ArtifactError, match="directory"):
        read_header(tmp_path)


def test_a_write_the_system_cuts_short(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(EnvironmentFault, match="larger than this system allows"):
            save_tensors(tmp_path / "x", {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_check_finite_names_the_first_bad_tensor(dtype: torch.dtype):
    bad = torch.tensor([1.0, float("nan"), 2.0]).to(dtype)
    check_finite({"a": torch.ones(2, dtype=dtype), "n": torch.ones(2, dtype=torch.int8)}, "x.safetensors")
    with pytest.raises(NumericError, match=r"Tensor b\.weight.*1 of 3.*x\.safetensors") as caught:
        check_finite({"a": torch.ones(2), "b.weight": bad, "c": bad}, "x.safetensors")
    assert caught.value.exit_code == 5
