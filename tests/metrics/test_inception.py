"""FID's Inception network against the graph written a second time, from every kind of file that carries its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from inception_reference import Graph, write_graphdef, write_torchscript
from safetensors.torch import save_file

from dqtool.errors import ArtifactError, EnvironmentFault, NumericError
from dqtool.metrics.graphdef import graph_constants
from dqtool.metrics.inception import CLASSES, SPATIAL, InceptionV3, tensorflow_scopes
from dqtool.metrics.inception_weights import load_inception, weights_digest
from dqtool.metrics.resize import bilinear_tensorflow, center_crop

IMAGES = torch.randint(0, 256, (2, 20, 33, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def graph() -> Graph:
    graph = Graph(seed=1)
    graph.expected = graph.run(IMAGES)  # type: ignore[attr-defined]
    return graph


@pytest.fixture(scope="module")
def pb(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_graphdef(graph.constants, tmp_path_factory.mktemp("pb") / "classify_image_graph_def.pb")


@pytest.fixture(scope="module")
def model(pb: Path) -> InceptionV3:
    return load_inception(pb)


def test_the_three_outputs_are_those_of_the_graph(graph: Graph, model: InceptionV3) -> None:
    with torch.no_grad():
        found = model(IMAGES.permute(0, 3, 1, 2))
    for name, expected in graph.expected.items():  # type: ignore[attr-defined]
        assert found[name].shape == expected.shape
        assert float(expected.std()) > 0.05, "a dead network proves nothing"
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert found["mixed_6"].shape[1] == SPATIAL == 2023


def test_every_kind_of_file_gives_the_same_network(model: InceptionV3, tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "pt_inception.pth")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "wrapped.pth")
    save_file({name: tensor for name, tensor in state.items() if "num_batches" not in name}, tmp_path / "a.safetensors")
    for name in ("pt_inception.pth", "wrapped.pth", "a.safetensors"):
        assert weights_digest(load_inception(tmp_path / name)) == weights_digest(model), name


def test_nvidias_archive_has_no_gamma(tmp_path: Path, graph: Graph) -> None:
    unit = {name: np.ones_like(array) if name.endswith("gamma") else array for name, array in graph.constants.items()}
    archive = load_inception(write_torchscript(unit, tmp_path / "inception-2015-12-05.pt"))
    assert weights_digest(archive) == weights_digest(load_inception(write_graphdef(unit, tmp_path / "unit.pb")))


def test_names_are_one_to_one(graph: Graph) -> None:
    scopes = dict(tensorflow_scopes())
    convs = {name.removesuffix("/conv2d_params") for name in graph.constants if name.endswith("conv2d_params")}
    assert set(scopes) == convs
    assert len(set(scopes.values())) == len(convs) == 94
    assert scopes["mixed_6/conv"] == "Mixed_6d.branch1x1"
    assert scopes["mixed_10/tower_1/mixed/conv_1"] == "Mixed_7c.branch3x3dbl_3b"


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (7, 500), (256, 256), (1, 1)])
def test_resizing_is_tensorflows_bit_by_bit(size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8)
    found = bilinear_tensorflow(images.permute(0, 3, 1, 2).float(), 299, 299).permute(0, 2, 3, 1)
    assert torch.equal(found, Graph.resize(images.numpy().astype(np.float32)))


@pytest.mark.parametrize("size", [(640, 480), (300, 300), (100, 900), (31, 30)])
def test_centre_crop(size: tuple[int, int]) -> None:
    from PIL import Image

    image = Image.new("RGB", size, (10, 20, 30))
    cropped = center_crop(image, 30)
    assert cropped.size == (30, 30)
    assert cropped.getpixel((15, 15)) == (10, 20, 30)


def test_the_crop_is_of_the_centre() -> None:
    from PIL import Image

    image = Image.new("RGB", (300, 100), "black")
    image.paste((255, 255, 255), (100, 0, 200, 100))
    assert np.array(center_crop(image, 100)).min() == 255


def test_files_that_are_something_else(tmp_path: Path, model: InceptionV3) -> None:
    def refused(kind: type[Exception], match: str, path: Path) -> None:
        with pytest.raises(kind, match=match):
            load_inception(path)

    refused(EnvironmentFault, "no such file", tmp_path / "missing.pth")
    for number, data in enumerate(
        (b"", b"hello, world, this is text", b"PK\x03\x04 broken", b"\x80\x02 broken", b"\x00" * 40)
    ):
        (tmp_path / f"bad{number}").write_bytes(data)
        refused(ArtifactError, "can't be read", tmp_path / f"bad{number}")
    state = {name: torch.zeros(1) for name in ("a", "b")}
    torch.save(state, tmp_path / "foreign.pth")
    refused(ArtifactError, "not the weights of FID's", tmp_path / "foreign.pth")
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    refused(ArtifactError, "torchvision", tmp_path / "torchvision.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    refused(ArtifactError, "no named tensors", tmp_path / "tensor.pth")
    broken = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    broken["fc.weight"][0, 0] = float("nan")
    torch.save(broken, tmp_path / "nan.pth")
    refused(NumericError, "fc.weight", tmp_path / "nan.pth")
    assert broken["fc.weight"].shape[0] == CLASSES


class Attack:
    """Payload of a malicious pickle."""

    def __reduce__(self):
        return (Path.touch, (Path("attacked"),))


def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Attack()}, tmp_path / "evil.pth")
    with pytest.raises(ArtifactError, match="can't be read"):
        load_inception(tmp_path / "evil.pth")
    assert not (tmp_path / "attacked").exists()


def test_truncated_graph(pb: Path, tmp_path: Path) -> None:
    (tmp_path / "half.pb").write_bytes(pb.read_bytes()[:100_000])
    with pytest.raises(ArtifactError):
        load_inception(tmp_path / "half.pb")
    with pytest.raises(ValueError, match="no float constants"):
        graph_constants(b"")
