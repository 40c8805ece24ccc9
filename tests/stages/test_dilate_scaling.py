"""Scalings that look at activations: what they record, what they refuse, what becomes of them in `distill`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_dilate_fold import loose_pipeline

import dqtool
from dqtool.artifacts import Artifact, open_artifact
from dqtool.errors import UsageError
from dqtool.nn.prediction import OF_IMAGES
from dqtool.scaling.methods import SCALINGS
from dqtool.scaling.verifying import TOLERANCE
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.common import Common
from dqtool.stages.dilate import SCALING_VERSIONS, DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.export import ExportOptions, export

QUIET = Common(quiet=True)


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model` and `calibrated.safetensors`, made without scaling."""
    root = tmp_path_factory.mktemp("scaling")
    first = dilate(
        DilateOptions(str(loose_pipeline(root / "model")), str(root / "none.safetensors"), scaling="none"), QUIET
    )
    calibrate(CalibrateOptions(first, str(root / "calibrated.safetensors"), steps=4, samples=16), QUIET)
    return root


def dilated(stats: Path, output: Path, **options: object) -> Artifact:
    given = DilateOptions(
        str(stats / "model"),
        str(output),
        stats=str(stats / "calibrated.safetensors"),
        **options,  # type: ignore[arg-type]
    )
    return open_artifact(dilate(given, QUIET))


def scalings(artifact: Artifact) -> dict[str, dict]:
    return {layer["name"]: layer["scaling"] for layer in artifact.manifest.layers if "scaling" in layer}


def test_osplus_moves_what_the_norm_makes_and_the_bias_takes_it_back(stats: Path, tmp_path: Path) -> None:
    artifact = dilated(stats, tmp_path / "d.safetensors", scaling="osplus")
    assert artifact.manifest.metrics["equivalence_error"] <= TOLERANCE
    shifted = {name: each["shifted_in"] for name, each in scalings(artifact).items() if "shifted_in" in each}
    assert shifted
    for name, into in shifted.items():
        assert name.split(".to_")[0] == into[0].removesuffix(".group_norm")
    name = "mid_block.attentions.0"
    tensors = artifact.tensors()
    original = load_file(stats / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    by = original[f"{name}.group_norm.bias"] - tensors[f"{name}.group_norm.bias"]
    lo, hi = open_artifact(stats / "calibrated.safetensors").tensors()[f"{name}.to_q.channel_range"]
    torch.testing.assert_close(by, (lo + hi) / 2, rtol=1e-4, atol=1e-5)
    added = tensors[f"{name}.to_q.bias"] - original[f"{name}.to_q.bias"]
    torch.testing.assert_close(added, original[f"{name}.to_q.weight"] @ by, rtol=1e-3, atol=1e-5)
    assert not any(name.endswith(".shift") for name in tensors)  # nothing that a runtime would have to know


@pytest.mark.parametrize("scaling", ["osplus", "omniquant", "auto"])
def test_moved_and_folded_together_are_still_equivalent(stats: Path, tmp_path: Path, scaling: str) -> None:
    artifact = dilated(stats, tmp_path / "d.safetensors", scaling=scaling, fold=True)
    assert artifact.manifest.metrics["equivalence_error"] <= TOLERANCE
    assert any("folded_into" in each for each in scalings(artifact).values())


def test_auto_records_whose_scale_each_layer_has(stats: Path, tmp_path: Path) -> None:
    artifact = dilated(stats, tmp_path / "d.safetensors", scaling="auto")
    assert artifact.manifest.metrics["equivalence_error"] <= TOLERANCE
    assert any("shifted_in" in each for each in scalings(artifact).values())
    assert artifact.manifest.parameters["scaling"] == "auto"
    assert artifact.manifest.parameters["bits"] == "4/4"
    assert artifact.manifest.parameters["scaling_version"] == SCALING_VERSIONS["auto"]  # hence in keys of what it makes
    methods = {each["method"] for each in scalings(artifact).values()}
    assert methods <= {"none", "wd", "smoothquant"}
    assert len(methods) > 1
    assert {each["asked"] for each in scalings(artifact).values()} == {"auto"}


@pytest.fixture(scope="module")
def late(stats: Path) -> dict[str, Artifact]:
    """What `dilate` and `calibrate` make of the default scaling when no statistics are given."""
    first = dilate(DilateOptions(str(stats / "model"), str(stats / "late.safetensors")), QUIET)
    second = calibrate(CalibrateOptions(first, str(stats / "late-c.safetensors"), steps=4, samples=16), QUIET)
    return {"dilated": open_artifact(first), "calibrated": open_artifact(second)}


def test_without_statistics_auto_is_chosen_in_calibrate(stats: Path, late: dict[str, Artifact], tmp_path: Path) -> None:
    before, after = late["dilated"], late["calibrated"]
    original = load_file(stats / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert not scalings(before)
    assert all(torch.equal(before.tensors()[name], value) for name, value in original.items())
    assert after.manifest.metrics["equivalence_error"] <= TOLERANCE
    assert "scaling_in_calibrate" not in after.manifest.metrics
    given = dilated(stats, tmp_path / "given.safetensors", scaling="auto")
    there, here = scalings(given), scalings(after)  # the same points were seen
    assert here
    assert {name: each["method"] for name, each in here.items()} == {n: each["method"] for n, each in there.items()}
    assert {name: each.get("shifted_in") for name, each in here.items()} == {
        name: each.get("shifted_in") for name, each in there.items()
    }
    assert any("shifted_in" in each for each in here.values())
    for name in original.keys() | {f"{name}.dilation" for name in here}:  # biases that were moved among them
        torch.testing.assert_close(after.tensors()[name], given.tensors()[name])


def test_what_calibrate_waits_for_is_part_of_its_key(stats: Path, tmp_path: Path) -> None:
    """The tensors that `dilate` leaves for a later choice are those of no scaling."""
    at, output = tmp_path / "d.safetensors", str(tmp_path / "c.safetensors")
    found = {}
    for scaling, bits in (("none", "4/4"), ("auto", "4/4"), ("auto", "8/8"), ("auto", "8/8")):
        dilate(DilateOptions(str(stats / "model"), str(at), scaling=scaling, bits=bits), QUIET)
        log = Common(quiet=True)
        calibrate(CalibrateOptions(str(at), output, steps=2, samples=4), log)
        found[scaling, bits] = log.log[-1].cached
        assert any(scalings(open_artifact(output))) == (scaling == "auto")
    assert found == {("none", "4/4"): False, ("auto", "4/4"): False, ("auto", "8/8"): True}


def test_statistics_are_of_the_inputs_after_they_were_scaled(stats: Path, late: dict[str, Artifact]) -> None:
    scaled, plain = late["calibrated"].tensors(), open_artifact(stats / "calibrated.safetensors").tensors()
    names = [name for name in scalings(late["calibrated"]) if f"{name}.channel_range" in plain]
    assert names
    for name in names:
        moved = "shifted_in" in scalings(late["calibrated"])[name]
        lo, hi = plain[f"{name}.channel_range"]
        torch.testing.assert_close(scaled[f"{name}.channel_range"], torch.stack([lo, hi]), rtol=1e-4, atol=1e-5)
        middle = (lo + hi) / 2 if moved else torch.zeros_like(lo)
        divided = (torch.stack([lo, hi]) - middle) / scaled[f"{name}.dilation"]
        span = torch.stack([scaled[f"{name}.range"][:, 0].min(), scaled[f"{name}.range"][:, 1].max()])
        torch.testing.assert_close(span, torch.stack([divided[0].min(), divided[1].max()]), rtol=1e-4, atol=1e-5)


def test_what_calibrate_moved_serves_other_scalings(stats: Path, late: dict[str, Artifact], tmp_path: Path) -> None:
    """Its ranges are those of the inputs as the model makes them."""
    assert any("shifted_in" in each for each in scalings(late["calibrated"]).values())
    chosen = []
    for number, given in enumerate((late["calibrated"].given, str(stats / "calibrated.safetensors"))):
        options = DilateOptions(
            str(stats / "model"), str(tmp_path / f"{number}.safetensors"), scaling="smoothquant", stats=given
        )
        chosen.append(open_artifact(dilate(options, QUIET)).tensors())
    for name, value in chosen[1].items():
        torch.testing.assert_close(chosen[0][name], value, rtol=1e-4, atol=1e-5)


def test_auto_is_learned_on(late: dict[str, Artifact], tmp_path: Path) -> None:
    runs = {}
    for iters in (0, 8):
        options = DistillOptions(
            late["calibrated"].given, str(tmp_path / f"{iters}.safetensors"), iters=iters, refine_iters=iters
        )
        runs[iters] = open_artifact(distill(options, QUIET)).tensors()
    name = "mid_block.resnets.0.conv1.dilation"
    assert torch.equal(runs[0][name], late["calibrated"].tensors()[name])
    change = (runs[8][name] / runs[0][name]).log().abs().max()
    assert 0 < change <= 8 * SCALINGS["auto"].learning_rate
    trained = scalings(open_artifact(tmp_path / "8.safetensors"))["mid_block.resnets.0.conv1"]
    assert trained["learned"]
    assert trained["mean"] == pytest.approx(float(runs[8][name].mean()))
    assert not any(each.get("learned") for each in scalings(open_artifact(tmp_path / "0.safetensors")).values())


def test_what_waits_for_calibrate_can_not_be_folded_before(stats: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"chosen in calibrate.*--stats"):
        dilate(DilateOptions(str(stats / "model"), str(tmp_path / "d.safetensors"), fold=True), QUIET)
    assert not (tmp_path / "d.safetensors").exists()


def test_the_bits_belong_to_what_looks_at_activations(stats: Path, tmp_path: Path) -> None:
    assert dilated(stats, tmp_path / "a.safetensors", scaling="auto", bits="8/8").manifest.parameters["bits"] == "8/8"
    plain = dilate(
        DilateOptions(str(stats / "model"), str(tmp_path / "b.safetensors"), scaling="wd", bits="8/8"), QUIET
    )
    assert "bits" not in open_artifact(plain).manifest.parameters
    with pytest.raises(UsageError, match="bits"):
        dilated(stats, tmp_path / "c.safetensors", scaling="auto", bits="nine")


def test_statistics_of_a_folded_model_are_refused(stats: Path, tmp_path: Path) -> None:
    folded = dilate(
        DilateOptions(str(stats / "model"), str(tmp_path / "f.safetensors"), scaling="wd", fold=True), QUIET
    )
    calibrated = calibrate(CalibrateOptions(folded, str(tmp_path / "c.safetensors"), steps=4, samples=16), QUIET)
    options = DilateOptions(str(stats / "model"), str(tmp_path / "d.safetensors"), scaling="dgq", stats=calibrated)
    with pytest.raises(UsageError, match=r"changed before they were recorded"):
        dilate(options, QUIET)
    assert not (tmp_path / "d.safetensors").exists()


def test_omniquant_learns_in_distill_and_ships_as_any_other(stats: Path, tmp_path: Path) -> None:
    first = dilated(stats, tmp_path / "dilated.safetensors", scaling="omniquant")
    second = calibrate(
        CalibrateOptions(first.given, str(tmp_path / "calibrated.safetensors"), steps=4, samples=16), QUIET
    )
    runs = {}
    for iters in (0, 8):
        options = DistillOptions(
            second, str(tmp_path / f"{iters}.safetensors"), bits="6/6", iters=iters, refine_iters=2 * (iters > 0)
        )
        runs[iters] = open_artifact(distill(options, QUIET))
    start, trained = (runs[iters].tensors() for iters in (0, 8))
    assert set(trained) - set(start) == {f"prediction.{name}" for name in OF_IMAGES}  # of what was trained
    assert set(start) < set(trained)
    name = "mid_block.resnets.0.conv1.dilation"
    assert torch.equal(start[name], first.tensors()[name])
    change = (trained[name] / start[name]).log().abs().max()
    assert 0 < change <= 1e-4  # eight steps of about 1e-5
    norm = "mid_block.attentions.0.group_norm.bias"
    assert not torch.equal(trained[norm], start[norm])  # the shift that was learned
    export(ExportOptions(runs[8].given, str(tmp_path / "exported")), QUIET)
    network = dqtool.load(str(tmp_path / "exported"))
    with torch.no_grad():
        y = network(torch.randn(2, 1, 8, 8), runs[8].tensors()["timesteps"][1], return_dict=False)[0]
    assert bool(torch.isfinite(y).all())
