"""`dqtool sensitivity`, `distill --bits auto` and `--protect` on the tiny chain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Run
from helpers import load_json, refused

import dqtool
from dqtool.stages import measured_bits

UNTRAINED = ("--iters", "0", "--refine-iters", "0", "--passes", "16", "--no-correct-noise")


def manifest(path: Path) -> dict:
    return json.loads(path.read_text())


def test_the_report_and_its_table(run: Run, chain: Path) -> None:
    plan = load_json(run("sensitivity", "--passes", "8", "--dry-run", "--json", cwd=chain).stdout)["work"]
    assert plan["passes"] == 8
    assert plan["seconds_about"] > 0
    result = run("sensitivity", "--passes", "8", "--bits", "4/4", cwd=chain)
    assert (result.returncode, result.stdout) == (0, "sensitivity.json\n"), result.stderr
    found = manifest(chain / "sensitivity.json")
    assert found["stage"] == "sensitivity"
    operands = found["metrics"]["operands"]
    assert operands[0]["layer"] in result.stderr
    assert sum(each["share"] for each in operands) == pytest.approx(1)
    ends = {each["bits"] for each in operands if each["layer"] in ("conv_in", "conv_out")}
    assert ends == {8}  # whatever the others have
    assert {row["bits"] for row in found["metrics"]["frontier"]} >= {"auto", "8/8", "4/4"}
    again = run("sensitivity", "--passes", "8", "--bits", "4/4", cwd=chain)
    assert "cached" in again.stderr
    assert operands[0]["layer"] in again.stderr
    keep = [part for line in found["metrics"]["keep"] for part in ("--keep", line)]
    typed = run("distill", "--bits", "4/4", *keep, *UNTRAINED, "-o", "kept.safetensors", cwd=chain)
    assert typed.returncode == 0, typed.stderr
    assert run("inspect", "sensitivity.json", cwd=chain).returncode == 0


def test_bits_by_target(run: Run, chain: Path) -> None:
    result = run("distill", "--bits", "auto", "--target-psnr", "30", *UNTRAINED, "-o", "auto.safetensors", cwd=chain)
    assert result.returncode == 0, result.stderr
    found = manifest(chain / "auto.json")
    assert found["parameters"]["bits"] == "auto"
    assert found["parameters"]["targets"] == {"psnr": 30}
    precision = found["metrics"]["precision"]
    assert precision["psnr"] >= 30
    assert (chain / "auto.safetensors").stat().st_size == precision["bytes"]
    assert len({tuple(layer["bits"]) for layer in found["layers"]}) > 1
    again = run("distill", "--bits", "auto", "--target-psnr", "30", *UNTRAINED, "-o", "auto.safetensors", cwd=chain)
    assert "cached" in again.stderr
    small = precision["bytes"] / 1e6 * 0.97
    result = run("distill", "--bits", "auto", "--target-size", str(small), *UNTRAINED, "-o", "s.safetensors", cwd=chain)
    assert result.returncode == 0, result.stderr
    assert (chain / "s.safetensors").stat().st_size <= small * 1e6
    operations = precision["bops"] / 1e9 * 0.8
    result = run(
        "distill", "--bits", "auto", "--target-bops", str(operations), *UNTRAINED, "-o", "b.safetensors", cwd=chain
    )
    assert result.returncode == 0, result.stderr
    assert manifest(chain / "b.json")["metrics"]["precision"]["bops"] <= operations * 1e9


def test_targets_out_of_reach(run: Run, chain: Path) -> None:
    assert "--target-size" in refused(run, chain, 2, "distill", "--bits", "auto", "--target-size", "0.001", *UNTRAINED)
    message = refused(
        run, chain, 2, "distill", "--bits", "auto", "--target-psnr", "99", "--target-size", "0.03", *UNTRAINED
    )
    assert "--target-" in message
    assert "--bits auto" in refused(run, chain, 2, "distill", "--target-psnr", "30")
    assert "--protect" in refused(run, chain, 2, "distill", "--bits", "auto", "--protect", "5")


def test_protected_operands(run: Run, chain: Path) -> None:
    for name, extra in (("plain", ()), ("protected", ("--protect", "30"))):
        result = run("distill", "--bits", "4/4", *extra, *UNTRAINED, "-o", f"{name}.safetensors", cwd=chain)
        assert result.returncode == 0, result.stderr
    plain, protected = manifest(chain / "plain.json"), manifest(chain / "protected.json")
    assert protected["parameters"]["protect"] == 30
    assert "protect" not in plain["parameters"]
    pairs = list(zip(plain["layers"], protected["layers"], strict=True))
    assert any(a["bits"] != b["bits"] for a, b in pairs)
    assert all(x <= y for a, b in pairs for x, y in zip(a["bits"], b["bits"], strict=True))
    assert plain["file"]["bytes"] < protected["file"]["bytes"] <= plain["file"]["bytes"] * 1.3


def test_bits_that_lose_the_samples_are_protected_by_default(
    run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bits_of(*options: str) -> tuple[dict, list]:
        output = ("-o", "given.safetensors", "--force")
        bits = () if "--bits" in options else ("--bits", "4/4")
        result = run("distill", *bits, *options, *UNTRAINED, *output, cwd=chain)
        assert result.returncode == 0, result.stderr
        found = manifest(chain / "given.json")
        return found, [layer["bits"] for layer in found["layers"]]

    _, plain = bits_of()  # a network too small to be measured
    monkeypatch.setattr(measured_bits, "WEIGHTS", range(1, 10**9))
    found, chosen = bits_of()
    assert found["parameters"]["protect"] == {
        "below": 40.0,
        "percent": [30.0, 40.0, 50.0, 60.0],
        "looks": 8,
        "least": 30.0,
    }
    wide = bits_of("--bits", "8/8")[0]["parameters"]["protect"]
    assert wide["least"] == 40.0  # 8 bits are for images that hold
    monkeypatch.setattr(measured_bits, "LEAST", 1.0)
    about = bits_of()[0]["metrics"]["protected"]
    before, after = about["predicted_psnr"]
    assert before < 30
    assert after > before + 3
    assert 0 < about["more_bops"] <= 0.3
    assert about["more_bytes"] <= 0.3
    assert chosen != plain
    monkeypatch.setattr(measured_bits, "LEAST", 99.0)
    most = bits_of()[0]["metrics"]["protected"]
    assert 0.3 < max(most["more_bops"], most["more_bytes"]) <= 0.6
    assert most["predicted_psnr"][1] > after
    for chosen_by_the_user in (("--protect", "0"), ("--keep", "conv_in=8/8"), ("--static",)):
        found, kept = bits_of(*chosen_by_the_user)
        assert "protected" not in found["metrics"]
        assert kept == plain
    monkeypatch.setattr(measured_bits, "ENOUGH", 1.0)
    found, kept = bits_of()
    assert "protected" not in found["metrics"]
    assert kept == plain


def test_chosen_bits_run_in_every_runtime(run: Run, chain: Path) -> None:
    """Layers of unequal widths, of float inputs and of float weights, in one network."""
    keep = (
        "--keep",
        "conv_in=16/8",
        "--keep",
        "conv_out=4/16",
        "--keep",
        r"mid_block\..*=3/7",
        "--keep",
        ".*attentions.*=8/5",
    )
    result = run("distill", "--bits", "5/8", *keep, *UNTRAINED, "-o", "mixed.safetensors", cwd=chain)
    assert result.returncode == 0, result.stderr
    assert run("export", "mixed.safetensors", "-o", "mixed", cwd=chain).returncode == 0
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(999)
    outputs = {}
    for runtime in ("simulate", "cpu", "openvino"):
        network = dqtool.load(str(chain / "mixed"), runtime=runtime)
        with torch.no_grad():
            outputs[runtime] = network(x, t).sample
    for runtime in ("cpu", "openvino"):
        assert (outputs[runtime] - outputs["simulate"]).norm() < 0.05 * outputs["simulate"].norm()
