"""Quantize the terrain model of the PyPI package adaptive-terrain-diffusion and compare its height maps with full precision.

    make terrain                                            writes recipes/results/terrain.md, .json and .png
    python recipes/terrain.py --only '1-8/8 default.*'      measures the rows whose names match again
    python recipes/terrain.py --every 8 --steps 1           a smaller run, on every eighth map

A row that was measured is kept in the work directory, so that an interrupted run goes on where it stopped. `--resume` keeps
the rows of the result, too: those of as many maps that the same command made.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from terrain_features import feature_distance, feature_network
from terrain_figures import figures_of, write_results
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
UNIFORM = ("8/8", "6/6", "4/8", "4/4")
TRAINED = {1: {"4/4": 100}, 4: {"4/8": 50, "4/4": 98}}
"""Training iterations of each block, and as many over all blocks, by number of steps and bits."""
TOGETHER = 4
"""Maps that are sampled at once: more don't fit into the processor's caches."""
SEED = 1
"""Seed of the maps. Their noise and difficulties are not those of the calibration."""
SAMPLES_PER_STEP = 128
"""Calibration samples of each of several steps: with 16 of each, 8/8 at four steps loses 3 dB."""
OTHER_SEED = 2
"""Seed of the maps of full precision whose distance is the floor of feature distances."""


@dataclass(frozen=True)
class Row:
    """One setting: its name, what it is, and the options of `dqtool distill` or the name of a peer."""

    steps: int
    name: str
    what: str
    options: list[str] = field(default_factory=list)
    bops_of: str | None = None
    peer: str | None = None

    @property
    def key(self) -> str:
        """Name of the row over all numbers of steps."""
        return f"{self.steps}-{self.name}"

    @property
    def file(self) -> str:
        """Stem of the row's files."""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.key)


def rows_of(given: argparse.Namespace) -> list[Row]:
    """Return all rows, those that matter most first."""
    found = []
    for steps in given.steps:
        own = UNIFORM if steps == 1 else ("8/8", "4/8", "4/4")
        found += [Row(steps, f"{bits} default", "as the defaults choose", ["--bits", bits, *UNTRAINED]) for bits in own]
        found += [
            Row(
                steps, f"{bits} uniform", "the same bits in every layer", ["--bits", bits, "--protect", "0", *UNTRAINED]
            )
            for bits in own
        ]
        if not given.untrained:
            for bits, iterations in TRAINED.get(steps, {}).items():
                trained = ["--iters", str(iterations), "--refine-iters", str(iterations), "--batch-size", "8"]
                found.append(
                    Row(steps, f"{bits} trained", "as the defaults choose, trained", ["--bits", bits, *trained])
                )
        if steps > 1:
            continue
        corrected = ["--bits", "4/4", *UNTRAINED, "--correct-noise"]
        found.append(Row(steps, "4/4 corrected", "as the defaults choose, predictions corrected", corrected))
        found += [Row(steps, peer, "", peer=peer) for peer in given.peers]
        found += [
            Row(
                steps,
                f"auto at {bits}",
                f"--bits auto within the bit operations of uniform {bits}",
                ["--bits", "auto", *UNTRAINED],
                f"{steps}-{bits} uniform",
            )
            for bits in own
        ]
        found += [Row(steps, bits, "weights alone", ["--bits", bits, *UNTRAINED]) for bits in ("8/16", "4/16")]
    return found


UNTRAINED = ("--iters", "0", "--refine-iters", "0")


def main() -> None:
    """Convert, calibrate, quantize and measure; write the results after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("results/terrain"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--maps", type=int, default=128)
    parser.add_argument("--every", type=int, default=1, help="draw every Nth map only, which takes less time")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples of one step")
    parser.add_argument("--passes", type=int, default=16, help="backward passes that measure errors")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--untrained", action="store_true", help="leave out the rows that take an hour of training each"
    )
    parser.add_argument(
        "--peers", nargs="*", default=["onnxruntime static", "onnxruntime dynamic", "NNCF", "SDNQ 8", "SDNQ 4"]
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows of the result")
    parser.add_argument("--only", help="measure only the rows whose names match this pattern, whether measured or not")
    given = parser.parse_args()
    check(given.results)
    try:
        feature_network()
    except ImportError as error:
        raise SystemExit(f"{error}: `make terrain` installs what this script needs") from error
    given.work.mkdir(parents=True, exist_ok=True)
    if not (given.work / "model").is_dir():
        from terrain_model import find_graph, write_pipeline

        write_pipeline(find_graph(), given.work / "model")
    dqtool("dilate", given.work / "model", "-o", given.work / "dilated.safetensors")
    rows = rows_of(given)
    if given.resume:
        keep_rows(rows, given)
    for row in rows:
        record = given.work / f"{row.file}.row.json"
        known = json.loads(record.read_text()) if record.is_file() else {}
        wanted = "features" not in known if given.only is None else re.fullmatch(given.only, row.key)
        if wanted:
            print(time.strftime("%H:%M:%S"), row.key, flush=True)
            try:
                found = measure(row, given)
            except ImportError as error:
                print(f"{row.key} is left out: {error}", file=sys.stderr)
                continue
            record.write_text(json.dumps(found, indent=1) + "\n")
        write_results([*rows], given)


def keep_rows(rows: list[Row], given: argparse.Namespace) -> None:
    """Write the records of rows that the result holds and the work directory lacks."""
    result = given.results / "terrain.json"
    known = {row.key: row for row in rows}
    for found in json.loads(result.read_text())["rows"] if result.is_file() else []:
        row = known.get(f"{found['steps']}-{found['name']}")
        if row is None or found["maps"] != len(range(0, given.maps, given.every)):
            continue
        record = given.work / f"{row.file}.row.json"
        same = row.peer is not None or row.bops_of is not None or found["command"] == command_of(row, given)
        if same and not record.is_file():
            record.write_text(json.dumps(found, indent=1) + "\n")


def command_of(row: Row, given: argparse.Namespace) -> str:
    """Return the command that quantizes a row, without its limit of bit operations."""
    return " ".join(["dqtool distill", *row.options, "--passes", str(given.passes)])


def measure(row: Row, given: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one row."""
    calibrated = calibrate(row.steps, given)
    start = time.process_time()
    if row.peer is not None:
        from terrain_peers import PEERS

        peer = PEERS[row.peer](given.work, calibrated)
        about = {"what": peer.what, "bytes": peer.bytes}
        maps = sample(peer.network, row.steps, given)
    else:
        about = {"what": row.what, **quantize(row, calibrated, given)}
        network = load_exported(given.work / f"{row.file}.safetensors")
        about["engine"] = network.runtime
        maps = sample(network, row.steps, given)
    torch.save(maps, given.work / f"{row.file}.maps.pt")
    full = full_precision(row.steps, given)
    figures = figures_of(maps, full)
    features = {
        "features": feature_distance(maps, full),
        "features_floor": feature_distance(full_precision(row.steps, given, OTHER_SEED), full),
    }
    return {
        "steps": row.steps,
        "name": row.name,
        **about,
        "every": given.every,
        **figures,
        **features,
        "cpu_seconds": time.process_time() - start,
    }


def calibrate(steps: int, given: argparse.Namespace) -> Path:
    """Return the path of the calibrated artifact for this number of steps."""
    calibrated = given.work / f"calibrated-{steps}.safetensors"
    samples = given.samples if steps == 1 else max(given.samples, SAMPLES_PER_STEP * steps)
    dqtool("calibrate", given.work / "dilated.safetensors", "--steps", steps, "--samples", samples, "-o", calibrated)
    return calibrated


def quantize(row: Row, calibrated: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Distill one setting; return its bytes, bit operations and command."""
    distilled = given.work / f"{row.file}.safetensors"
    options = [*row.options, "--passes", str(given.passes)]
    if row.bops_of is not None:
        limit = json.loads((given.work / f"{Row(0, row.bops_of, '').file[2:]}.row.json").read_text())["bops"]
        options += ["--target-bops", f"{limit / 1e9:.6f}"]
    dqtool("distill", calibrated, *options, "-o", distilled)
    from dqtool.artifacts import read_manifest
    from dqtool.core.cost import bops

    manifest = json.loads(distilled.with_suffix(".json").read_text())

    found = {
        "bytes": distilled.stat().st_size,
        "bops": bops(read_manifest(distilled).layers),
        "command": " ".join(["dqtool distill", *options]),
    }
    if "protected" in manifest["metrics"]:
        found["protected"] = {k: v for k, v in manifest["metrics"]["protected"].items() if k != "keep"}
    if "training_cpu_seconds" in manifest["metrics"]:
        found["training_cpu_seconds"] = manifest["metrics"]["training_cpu_seconds"]
    return found


def load_exported(distilled: Path) -> Any:
    """Export a distilled network and return it on the fastest engine, as its users load it."""
    from dqtool.stages.evaluation.engines import run_exported

    exported = distilled.with_suffix("")
    dqtool("export", distilled, "-o", exported)
    return run_exported(str(exported), "auto", TOGETHER)


def full_precision(steps: int, given: argparse.Namespace, seed: int = SEED) -> Tensor:
    """Return the height maps of the network in full precision, `[N, 1, 128, 128]`."""
    stem = f"full-{steps}-{given.maps}" if seed == SEED else f"full-{steps}-{given.maps}-seed{seed}"
    whole = given.work / f"{stem}-1.pt"
    if whole.is_file():
        all_maps: Tensor = torch.load(whole)
        return all_maps[:: given.every]
    path = given.work / f"{stem}-{given.every}.pt"
    if not path.is_file():
        from dqtool.artifacts import open_artifact
        from dqtool.stages.shared.artifact_models import teacher_of

        artifact = open_artifact(str(calibrate(steps, given)), ["calibrate"])
        torch.save(sample(teacher_of(artifact.manifest, artifact.tensors()), steps, given, seed), path)
    found: Tensor = torch.load(path)
    return found


def sample(network: nn.Module, steps: int, given: argparse.Namespace, seed: int = SEED) -> Tensor:
    """Return the height maps that a network draws, `[N, 1, 128, 128]`: the same noise and difficulties for all."""
    from dqtool import report
    from dqtool.artifacts import open_artifact
    from dqtool.models.sampling.sampler import IMAGES, image_seeds, initial_noise
    from dqtool.stages.evaluation.images import maker_of_artifact

    artifact = open_artifact(str(given.work / f"calibrated-{steps}.safetensors"), ["calibrate"])
    maker = maker_of_artifact(artifact, given.maps, seed)
    indices, found = range(0, given.maps, given.every), []
    with report.progress("maps", len(indices), "map") as progress, torch.no_grad():
        for start in range(0, len(indices), TOGETHER):
            part = indices[start : start + TOGETHER]
            labels = [maker.conditions.given(i, i + 1) for i in part]
            conditions = {name: torch.cat([each[name] for each in labels]) for name in labels[0]}
            noise = initial_noise(maker.shape, part, seed, IMAGES)
            found.append(maker.sampler.run(network, noise, conditions, image_seeds(part, seed, IMAGES)))
            progress.advance(len(part))
    return torch.cat(found).clamp(-1, 1)


def check(results: Path) -> None:
    """Refuse, before any work, to replace results that are not this script's."""
    from dqtool.artifacts.outputs import check_results

    check_results(results / "terrain.json", [results / "terrain.md"])


def dqtool(*arguments: object) -> None:
    """Run one command."""
    subprocess.run([sys.executable, "-m", "dqtool", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
