from __future__ import annotations

import io
import json
import os
import resource
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from timing import within

from dqtool.artifacts import read_header, read_manifest, sha256_file
from dqtool.artifacts.npz import npz_arrays, npz_names
from dqtool.artifacts.reading import check_archive, load_json, open_regular, parse_json, read_text_file
from dqtool.errors import ArtifactError, DqtoolError, EnvironmentFault, UsageError
from dqtool.metrics.batches import NpzImages
from dqtool.metrics.graphdef import graph_constants
from dqtool.metrics.prompts import read_prompts
from dqtool.models.sources.original.checkpoint import read_entries
from dqtool.models.sources.resolve import resolve_model
from dqtool.recipe import load_recipe
from dqtool.yamltree import compose

READERS: dict[str, Callable[[Path], object]] = {
    "safetensors": read_header,
    "digest": sha256_file,
    "json": load_json,
    "text": lambda path: read_text_file(path, 100),
    "manifest": lambda path: read_manifest(_beside(path, ".json")),
    "prompts": read_prompts,
    "npz": npz_names,
    "recipe": lambda path: load_recipe(path, [], {}),
    "checkpoint": lambda path: read_entries(path.with_suffix(".ckpt")),
    "config": lambda path: resolve_model(str(_weights(path.parent)), str(path)),
}


def _beside(path: Path, suffix: str) -> Path:
    """The artifact whose manifest the special file is."""
    artifact = path.with_suffix(".safetensors")
    artifact.write_bytes(b"")
    return artifact


def _weights(directory: Path) -> Path:
    from dqtool.artifacts.header import file_header

    path = directory / "weights.safetensors"
    path.write_bytes(file_header({"a": ("F32", [1])})[0] + bytes(4))
    return path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("special", ["pipe", "device", "socket"])
def test_special_files_are_refused_before_they_are_opened(
    reader: str, special: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "given.json"
    if special == "pipe":
        os.mkfifo(path)
    elif special == "device":
        path.symlink_to("/dev/zero")
    else:
        server = socket.socket(socket.AF_UNIX)
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        server.bind(path.name)
    if reader == "checkpoint":
        path.rename(path.with_suffix(".ckpt"))
    with pytest.raises(DqtoolError, match="pipe|device|socket") as caught:
        READERS[reader](path)
    assert caught.value.exit_code == (2 if reader == "recipe" else 3)


@pytest.mark.parametrize("reader", [name for name in READERS if name not in ("manifest", "config")])
def test_a_nul_in_a_path(reader: str, tmp_path: Path):
    with pytest.raises(DqtoolError):
        READERS[reader](tmp_path / "a\0b")


def test_missing_files_and_too_few_handles_are_of_the_environment(tmp_path: Path):
    with pytest.raises(EnvironmentFault):
        open_regular(tmp_path / "gone")
    (tmp_path / "there").write_text("{}")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(EnvironmentFault, match="Too many files"):
            load_json(tmp_path / "there")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * 70 + "]" * 70,
        '{"a":' * 70 + "1" + "}" * 70,
        "[" + ",".join(["1"] * 1_000_001) + "]",
        "9" * 4000,
        "-" + "9" * 30,
        "1e999",
        "9" * 500 + ".0",
        "NaN",
        '"\\ud800',
        "",
    ],
    ids=lambda text: f"{text[:8]}-{len(text)}",
)
def test_json_beyond_the_bounds(text: str):
    def parse(given: str | bytes) -> None:
        with pytest.raises(ValueError, match="."):
            parse_json(given)

    within(1, lambda: parse(text))
    within(1, lambda: parse(text.encode()))


def test_json_within_the_bounds():
    assert parse_json(b'{"a": [1, -2.5, "b", null, true, 18446744073709551615]}')["a"][5] == 2**64 - 1
    assert parse_json("[-Infinity]", finite=False) == [float("-inf")]


def safetensors(header: object) -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1] * 17, "data_offsets": [0, 4]}},
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 4000 + b'], "data_offsets": [0, 4]}}',
        {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)},
        b"[" * 100_000,
        {"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}},
        {"a": [1], "b": 2},
    ],
    ids=["rank", "rank 17", "digits", "tensors", "depth", "dtype", "entry"],
)
def test_headers_beyond_the_bounds(header: object, tmp_path: Path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors(header) + bytes(4))

    def read() -> None:
        with pytest.raises(ArtifactError, match="no valid safetensors"):
            read_header(path)

    within(1, read)
    path.write_bytes((20 << 20).to_bytes(8, "little"))
    with pytest.raises(ArtifactError, match="header would take"):
        read_header(path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "a: " + "b" * 70_000_0,
        "- a\n" * 30_000,
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)),
        "a: &a [*a]",
        '"\\UFFFFFFFF"',
        "%YAML 9.9999999999\n--- a",
        "a\x00b",
    ],
    ids=["depth", "bytes", "nodes", "aliases", "endless", "character", "version", "control"],
)
def test_yaml_beyond_the_bounds(text: str, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)

    def load() -> None:
        with pytest.raises(UsageError):
            load_recipe(path, [], {})

    within(1, load)


@pytest.mark.parametrize("value", ["!!int ''", "!!float ''", "1:30", "1" * 65, "!!int x", "!!timestamp 1", "0x"])
def test_numbers_that_yaml_alone_knows(value: str):
    from dqtool.yamltree import convert

    node = compose(value, "r")
    assert node is not None
    with pytest.raises(UsageError):
        convert(node, int, "r", "steps")


def archive(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as made:
        for name, content in members:
            made.writestr(name, content)
    return stream.getvalue()


class TestArchives:
    def test_a_checkpoint_that_inflates(self, tmp_path: Path):
        path = tmp_path / "a.ckpt"
        path.write_bytes(archive(("a/data.pkl", bytes(64 << 20)), compression=zipfile.ZIP_DEFLATED))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ArtifactError, match="compressed"):
            read_entries(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10

    def test_a_checkpoint_whose_pickle_is_too_large(self, tmp_path: Path):
        path = tmp_path / "a.ckpt"
        path.write_bytes(archive(("a/data.pkl", bytes(5 << 20))))
        with pytest.raises(ArtifactError, match="list of this checkpoint's objects"):
            read_entries(path)

    @pytest.mark.parametrize("cut", [1, 10, 30])
    def test_a_cut_archive(self, cut: int):
        with pytest.raises(ValueError, match="zip"):
            check_archive(io.BufferedReader(io.BytesIO(archive(("a", b"b"))[:-cut])))  # type: ignore[arg-type]

    def test_an_array_is_not_inflated_before_its_shape_is_checked(self, tmp_path: Path):
        path = tmp_path / "a.npz"
        np.savez_compressed(path, mu=np.zeros(1 << 24), arr_0=np.zeros((1, 8192, 8192, 3), np.uint8))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ArtifactError, match="at most"):
            npz_arrays(path, ["mu"])
        with pytest.raises(ArtifactError, match="read at once"):
            NpzImages(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


def test_a_graph_of_many_values():
    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    dimension = field(2, b"\x08" + bytes([0x80, 0xCA, 0xB5, 0xEE, 0x01]))  # 5 * 10^8
    tensor = b"\x08\x01" + field(2, dimension) + field(5, bytes(4))
    node = field(1, b"a") + field(2, b"Const") + field(5, field(1, b"value") + field(2, field(8, tensor)))
    with pytest.raises(ValueError, match="values"):
        graph_constants(field(1, node))
