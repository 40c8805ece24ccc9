"""Archives that torch writes, read without running them: the same tensors, and nothing of a hostile file's."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from timing import within
from torch import nn

from dqtool.artifacts.torch_archive import archive_content, flat_tensors, is_archive
from dqtool.errors import ArtifactError
from dqtool.metrics.aesthetic import load_aesthetic_head
from dqtool.metrics.inception_weights import load_inception
from dqtool.models.sources.original.checkpoint import read_checkpoint


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("table", torch.arange(6.0).view(2, 3).t())
        self.names = ["a", "b"]
        self.sizes = [1, 2]
        self.lookup = {"k": 1}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.short = nn.Parameter(torch.randn(4).to(torch.bfloat16))
        self.parts = nn.ModuleList([nn.Linear(1, 1), nn.BatchNorm2d(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_torchscript_module_has_the_names_and_tensors_of_its_state_dict(tmp_path: Path):
    torch.manual_seed(0)
    torch.jit.script(Outer()).save(tmp_path / "m.pt")  # type: ignore[no-untyped-call]
    assert is_archive(tmp_path / "m.pt")
    expected = torch.jit.load(tmp_path / "m.pt").state_dict()  # type: ignore[no-untyped-call]
    assert equal(flat_tensors(archive_content(tmp_path / "m.pt")), expected)


def test_a_state_dict(tmp_path: Path):
    whole = torch.randn(4, 5)
    state = {"a.weight": whole, "a.view": whole[1:, ::2], "n": torch.tensor(3), "empty": torch.empty(0, 2)}
    state |= {"p": nn.Parameter(torch.ones(2)), "bool": torch.tensor([True, False])}
    torch.save({"state_dict": state, "epoch": 7, "note": "text"}, tmp_path / "s.pth")
    content = archive_content(tmp_path / "s.pth")
    assert (content["epoch"], content["note"]) == (7, "text")
    assert equal(content["state_dict"], {name: tensor.detach() for name, tensor in state.items()})


class Hostile(nn.Module):
    """Restores itself with TorchScript's own operation that writes a file."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.place = place

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return (self.weight, self.place, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.weight = state[0]
        self.place = state[1]
        self.training = state[2]
        torch.save(self.weight, self.place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight


def test_setstate_of_a_real_module_does_not_run(tmp_path: Path):
    target = tmp_path / "written"
    torch.jit.script(Hostile(str(target))).save(tmp_path / "hostile.pt")  # type: ignore[no-untyped-call]
    torch.jit.load(tmp_path / "hostile.pt")  # type: ignore[no-untyped-call]
    assert target.exists(), "the attack proves nothing if it does not work"
    target.unlink()
    flat_tensors(archive_content(tmp_path / "hostile.pt"))
    assert not target.exists()
    with pytest.raises(ArtifactError, match="not the weights of FID's"):
        load_inception(tmp_path / "hostile.pt")
    with pytest.raises(ArtifactError):
        load_aesthetic_head(tmp_path / "hostile.pt", 768)
    with pytest.raises(ArtifactError):
        read_checkpoint(tmp_path / "hostile.pt")
    assert not target.exists()


class Attack:
    def __init__(self, call: tuple[Any, ...]) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        (os.system, ("touch attacked",)),
        (Path.touch, (Path("attacked"),)),
        (exec, ("open('attacked', 'w')",)),
        (torch.load, ("attacked",)),
        (getattr, ("text", "upper")),
    ],
    ids=["system", "touch", "exec", "load", "getattr"],
)
def test_a_pickle_calls_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: tuple[Any, ...]):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Attack(call)}, "evil.pth")
    with pytest.raises(ValueError, match="run code"):
        archive_content(Path("evil.pth"))
    assert not Path("attacked").exists()


def archive(path: Path, program: bytes, members: dict[str, bytes] | None = None, compress: bool = False) -> Path:
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as out:
        out.writestr("a/data.pkl", program)
        for name, data in (members or {}).items():
            out.writestr(f"a/{name}", data)
    return path


def tensor(count: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    """The program of `{"x": tensor}`, written by hand."""

    def number(value: int) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    identity = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(count) + b"tQ"
    arguments = (
        b"(" + identity + number(offset) + numbers(shape) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)Rt"
    )
    return b"\x80\x02}" + text("x") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def test_the_program_written_by_hand_is_a_tensor(tmp_path: Path):
    path = archive(tmp_path / "a.pt", tensor(4, 1, (3,), (1,)), {"data/0": torch.arange(4.0).numpy().tobytes()})
    assert archive_content(path)["x"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("program", "data"),
    [
        (tensor(4, 2, (3,), (1,)), bytes(16)),  # past the end
        (tensor(4, 0, (10**9,), (0,)), bytes(16)),  # more numbers than there are
        (tensor(4, 0, (10**12, 0), (10**12, 1)), bytes(12)),  # the member is shorter
        (tensor(10**12, 0, (1,), (1,)), bytes(16)),
        (tensor(4, 0, (2, 2), (1,)), bytes(16)),
        (tensor(4, 0, (-1,), (1,)), bytes(16)),
        (tensor(4, 0, (4,), (1,), "../1"), bytes(16)),
        (b"\x80\x02" + b"(" * 400_000 + b".", b""),
        (b"\x80\x02Nr\xff\xff\xff\xff" + b"j\xfe\xff\xff\xff.", b""),
        (b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"x.", b""),
        (b"\x80\x02" + b"]q\x00" + b"h\x00\x85" * 2000 + b"a.", b""),
        (b"", b""),
        (b"\x80\x02N", b""),
        (b"\x80\x02ccollections\nOrderedDict\n(i__main__\nX\n.", b""),
        (b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.", b""),
        (b"\x80\x02c__torch__\nM\nX\x04\x00\x00\x00true\x85R.", b""),
        (b"\x80\x02c__torch__\nM\nX\x04\x00\x00\x00true\x85\x81.", b""),
    ],
)
def test_whatever_is_damaged_or_too_large_is_refused_at_once(tmp_path: Path, program: bytes, data: bytes):
    path = archive(tmp_path / "a.pt", program, {"data/0": data})

    def read() -> None:
        with pytest.raises(ValueError, match=r"archive|pickle|expected|not enough|instruction"):
            flat_tensors(archive_content(path))

    within(1, read)


def test_what_inflates_is_refused(tmp_path: Path):
    path = archive(tmp_path / "a.pt", b"\x80\x02X" + bytes(1 << 26), compress=True)
    with pytest.raises(ValueError, match="too long"):
        archive_content(path)
    path = archive(tmp_path / "b.pt", tensor(1 << 22, 0, (4,), (1,)), {"data/0": bytes(1 << 24)}, compress=True)
    with pytest.raises(ValueError, match="missing or damaged"):
        archive_content(path)


def test_values_shared_a_billion_times_end(tmp_path: Path):
    program = b"\x80\x02}q\x00"
    for depth in range(60):  # each dict holds the one before twice
        pair = b"".join(b"X\x01\x00\x00\x00" + key + b"h" + bytes([depth]) for key in (b"a", b"b"))
        program += b"}q" + bytes([depth + 1]) + b"(" + pair + b"u"
    path = archive(tmp_path / "a.pt", program + b".")
    with pytest.raises(ValueError, match="too many values"):
        flat_tensors(archive_content(path))
