"""`calibrate --scaling`: what it keeps, replaces and records, what it refuses, and what `distill` makes of it."""

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
from dqtool.scaling.methods import METHODS
from dqtool.scaling.verifying import TOLERANCE
from dqtool.stages.calibrate import SCALING_VERSIONS, CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.shared.settings import RunSettings

QUIET = RunSettings(quiet=True)
WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model`, dilated as `wd`, `none` and `folded`."""
    root = tmp_path_factory.mktemp("scaling")
    model = str(loose_pipeline(root / "model"))
    dilate(DilateOptions(model, str(root / "wd.safetensors")), QUIET)
    dilate(DilateOptions(model, str(root / "none.safetensors"), scaling="none"), QUIET)
    dilate(DilateOptions(model, str(root / "folded.safetensors"), fold=True), QUIET)
    return root


def calibrated(root: Path, dilated: str, scaling: str, **options: object) -> Artifact:
    """The artifact `dilated` calibrated with a scaling, made once."""
    output = (
        root / f"{dilated}-{scaling}{''.join(f'-{value}' for value in options.values()).replace('/', '')}.safetensors"
    )
    given = CalibrateOptions(
        str(root / f"{dilated}.safetensors"),
        str(output),
        steps=4,
        samples=16,
        scaling=scaling,
        **options,  # type: ignore[arg-type]
    )
    return open_artifact(calibrate(given, QUIET))


def scalings(artifact: Artifact) -> dict[str, dict]:
    return {layer.name: layer.scaling.to_json() for layer in artifact.manifest.layers if layer.scaling is not None}


def original(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / WEIGHTS)


def test_dilate_dilates_by_default(root: Path) -> None:
    artifact = open_artifact(root / "wd.safetensors")
    assert artifact.manifest.parameters.as_read["scaling"] == "wd"
    assert {each["method"] for each in scalings(artifact).values()} == {"wd"}
    assert any(not torch.equal(artifact.tensors()[name], value) for name, value in original(root).items())


def test_keep_leaves_dilates_tensors(root: Path) -> None:
    before, after = open_artifact(root / "wd.safetensors"), calibrated(root, "wd", "keep")
    assert scalings(after) == scalings(before)
    assert all(torch.equal(after.tensors()[name], value) for name, value in before.tensors().items())
    assert "scaling" not in after.manifest.parameters.as_read


def test_none_takes_dilates_factors_out(root: Path) -> None:
    artifact = calibrated(root, "wd", "none")
    tensors = artifact.tensors()
    assert not scalings(artifact)
    assert not any(name.endswith(".dilation") for name in tensors)
    assert artifact.manifest.metrics.as_read["unsaturated_share"] == 0
    for name, value in original(root).items():
        torch.testing.assert_close(tensors[name], value, rtol=3e-7, atol=0)


def test_auto_is_the_default_and_records_the_method_of_each_layer(root: Path) -> None:
    assert CalibrateOptions().scaling == "auto"
    artifact = calibrated(root, "wd", "auto")
    parameters = artifact.manifest.parameters.as_read
    assert artifact.manifest.metrics.as_read["equivalence_error"] <= TOLERANCE
    assert (parameters["scaling"], parameters["bits"]) == ("auto", "4/4")
    assert parameters["scaling_version"] == SCALING_VERSIONS["auto"]  # hence in keys of what it makes
    found = scalings(artifact)
    assert any("shifted_in" in each for each in found.values())
    methods = {each["method"] for each in found.values()}
    assert methods <= {"none", "wd", "smoothquant"}
    assert len(methods) > 1
    assert {each["asked"] for each in found.values()} == {"auto"}


def test_auto_chooses_the_same_whether_or_not_the_model_was_dilated(root: Path) -> None:
    """Undoing the dilation costs one unit in the last place of a weight.

    One factor for all in-channels, as in a layer with a single one, changes no code: every factor is as good, and the choice may
    differ from processor to processor.
    """
    there, here = calibrated(root, "none", "auto"), calibrated(root, "wd", "auto")
    for key in ("method", "shifted_in"):
        assert {n: each.get(key) for n, each in scalings(here).items()} == {
            n: each.get(key) for n, each in scalings(there).items()
        }
    for name in original(root).keys() | {f"{name}.dilation" for name in scalings(here)}:
        alone = name.startswith("conv_in.")  # one in-channel
        rtol = 0.03 if alone else 1e-4
        torch.testing.assert_close(here.tensors()[name], there.tensors()[name], rtol=rtol, atol=1e-6)


def test_auto_keeps_the_tensors_of_layers_whose_dilation_is_best(root: Path) -> None:
    before, after = open_artifact(root / "wd.safetensors").tensors(), calibrated(root, "wd", "auto")
    kept = [name for name, each in scalings(after).items() if each["method"] == "wd" and f"{name}.dilation" in before]
    assert kept
    for name in kept:
        for leaf in ("weight", "dilation"):
            assert torch.equal(after.tensors()[f"{name}.{leaf}"], before[f"{name}.{leaf}"])


@pytest.mark.parametrize("method", sorted(name for name in METHODS if METHODS[name].needs_statistics))
def test_every_scaling_is_equivalent_before_quantization(root: Path, method: str) -> None:
    for dilated in ("wd", "folded"):
        artifact = calibrated(root, dilated, method)
        assert artifact.manifest.metrics.as_read["equivalence_error"] <= TOLERANCE
        assert method in {each.get("asked", each["method"]) for each in scalings(artifact).values()}


def test_folded_factors_stay_where_they_are(root: Path) -> None:
    before, after = open_artifact(root / "folded.safetensors"), calibrated(root, "folded", "auto")
    folded = {name: each for name, each in scalings(before).items() if "folded_into" in each}
    assert folded
    assert all(scalings(after)[name] == each for name, each in folded.items())
    for name in folded:
        assert torch.equal(after.tensors()[f"{name}.weight"], before.tensors()[f"{name}.weight"])
    assert any(each.get("asked") == "auto" for each in scalings(after).values())


def test_osplus_moves_what_the_norm_makes_and_the_bias_takes_it_back(root: Path) -> None:
    artifact = calibrated(root, "none", "osplus")
    shifted = {name: each["shifted_in"] for name, each in scalings(artifact).items() if "shifted_in" in each}
    assert shifted
    for name, into in shifted.items():
        assert name.split(".to_")[0] == into[0].removesuffix(".group_norm")
    name = "mid_block.attentions.0"
    tensors, before = artifact.tensors(), original(root)
    by = before[f"{name}.group_norm.bias"] - tensors[f"{name}.group_norm.bias"]
    lo, hi = calibrated(root, "none", "keep").tensors()[f"{name}.to_q.channel_range"]
    torch.testing.assert_close(by, (lo + hi) / 2, rtol=1e-4, atol=1e-5)
    added = tensors[f"{name}.to_q.bias"] - before[f"{name}.to_q.bias"]
    torch.testing.assert_close(added, before[f"{name}.to_q.weight"] @ by, rtol=1e-3, atol=1e-5)
    assert not any(name.endswith(".shift") for name in tensors)  # nothing that a runtime would have to know


def test_statistics_are_of_the_inputs_after_they_were_scaled(root: Path) -> None:
    artifact = calibrated(root, "wd", "auto")
    scaled, plain = artifact.tensors(), calibrated(root, "none", "keep").tensors()
    names = [name for name in scalings(artifact) if f"{name}.channel_range" in plain]
    assert names
    for name in names:
        moved = "shifted_in" in scalings(artifact)[name]
        lo, hi = plain[f"{name}.channel_range"]
        torch.testing.assert_close(scaled[f"{name}.channel_range"], torch.stack([lo, hi]), rtol=1e-4, atol=1e-5)
        middle = (lo + hi) / 2 if moved else torch.zeros_like(lo)
        divided = (torch.stack([lo, hi]) - middle) / scaled[f"{name}.dilation"]
        span = torch.stack([scaled[f"{name}.range"][:, 0].min(), scaled[f"{name}.range"][:, 1].max()])
        torch.testing.assert_close(span, torch.stack([divided[0].min(), divided[1].max()]), rtol=1e-4, atol=1e-5)


def test_scaling_and_bits_are_part_of_the_key(root: Path, tmp_path: Path) -> None:
    output, cached = str(tmp_path / "c.safetensors"), []
    for scaling, bits in (("keep", "4/4"), ("keep", "8/8"), ("auto", "4/4"), ("auto", "8/8"), ("auto", "8/8")):
        log = RunSettings(quiet=True)
        given = str(root / "wd.safetensors")
        calibrate(CalibrateOptions(given, output, steps=2, samples=4, scaling=scaling, bits=bits), log)
        cached.append(log.log[-1].cached)
    assert cached == [False, True, False, False, True]  # `keep` compares nothing at any bits


def test_auto_is_learned_on(root: Path, tmp_path: Path) -> None:
    artifact, runs = calibrated(root, "wd", "auto"), {}
    for iters in (0, 8):
        options = DistillOptions(
            artifact.given, str(tmp_path / f"{iters}.safetensors"), iters=iters, refine_iters=iters
        )
        runs[iters] = open_artifact(distill(options, QUIET)).tensors()
    name = "mid_block.resnets.0.conv1.dilation"
    assert torch.equal(runs[0][name], artifact.tensors()[name])
    change = (runs[8][name] / runs[0][name]).log().abs().max()
    assert 0 < change <= 8 * METHODS["auto"].learning_rate
    trained = scalings(open_artifact(tmp_path / "8.safetensors"))["mid_block.resnets.0.conv1"]
    assert trained["learned"]
    assert trained["mean"] == pytest.approx(float(runs[8][name].mean()))
    assert not any(each.get("learned") for each in scalings(open_artifact(tmp_path / "0.safetensors")).values())


def test_omniquant_learns_in_distill_and_ships_as_any_other(root: Path, tmp_path: Path) -> None:
    first, runs = calibrated(root, "wd", "omniquant"), {}
    for iters in (0, 8):
        options = DistillOptions(
            first.given, str(tmp_path / f"{iters}.safetensors"), bits="6/6", iters=iters, refine_iters=2 * (iters > 0)
        )
        runs[iters] = open_artifact(distill(options, QUIET))
    start, trained = (runs[iters].tensors() for iters in (0, 8))
    assert set(trained) - set(start) == {f"prediction.{name}" for name in OF_IMAGES}  # only trained tables
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


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].needs_statistics])
def test_dilate_names_the_option_of_what_needs_activations(name: str) -> None:
    with pytest.raises(UsageError, match=rf"looks at activations.*calibrate --scaling {name}"):
        DilateOptions("model", scaling=name)


def test_each_stage_offers_its_own_scalings() -> None:
    with pytest.raises(UsageError, match=r"takes no statistics.*--stats.*calibrate --scaling"):
        DilateOptions("model", stats="calibrated.safetensors")
    with pytest.raises(UsageError, match=r"--bits.*calibrate --bits"):
        DilateOptions("model", bits="8/8")
    with pytest.raises(UsageError, match=r"no scaling 'magic'.*wd, none\."):
        DilateOptions("model", scaling="magic")
    with pytest.raises(UsageError, match=r"weights alone.*dilate --scaling wd.*--scaling keep"):
        CalibrateOptions(scaling="wd")
    with pytest.raises(UsageError, match=r"no scaling 'magic'.*keep, none, smoothquant"):
        CalibrateOptions(scaling="magic")
    with pytest.raises(UsageError, match="bits"):
        CalibrateOptions(bits="nine")
