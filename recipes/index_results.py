"""Write `recipes/results/README.md`, the index of all committed results, and the tables of README.md that quote them.

    python recipes/index_results.py           write both
    python recipes/index_results.py --check   print what is wrong: files that differ from the results, numbers in a README
                                              that no result holds, and results whose command does not make them

Every figure comes from a result file. README.md marks the tables that this script writes with `<!-- results: NAME -->` and
`<!-- end -->`. A result is made by its command if the command is a target of the Makefile, a recipe or a script of this
repository, and if the result records another command, that one names the file of the same target.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes" / "results"
INDEX = RESULTS / "README.md"
README = ROOT / "README.md"
MODELS = ("fashion", "digits-ddpm", "digits-dit", "digits-ldm", "digits-sd")
EARLIER_NAMES = {"onednn": "cpu"}
"""Runtimes that committed results know by an earlier name."""

COMMANDS = {
    "digits-ddpm-w6a6-onednn": "dqtool eval exported --runtime cpu --reference exported --samples 2048 --metrics digits,similarity",
    "digits-ddpm-w6a6-openvino": "dqtool eval exported --runtime openvino --reference exported --samples 2048 --metrics digits,similarity",
    "digits-ddpm-w6a6-openvino-bf16": "dqtool eval exported --runtime openvino-bf16 --reference exported --samples 4096",
    "digits-ddpm-w6a6-seed1": "make digits-ddpm-w6a6, `--scaling wd --no-correct-noise --seed 1`",
    "digits-ddpm-w6a6-seed2": "make digits-ddpm-w6a6, `--scaling wd --no-correct-noise --seed 2`",
    "dilate-sd14": "make dilate-cost",
    "full-size": "make full-size",
    "same-integers": "make same-integers",
    "fuzz": "make fuzz",
    "classes": "make classes",
    "mixins": "make mixins DIFFUSERS=path/to/checkout",
}
"""Commands of results that do not record their own."""

EARLIER_NOISE = {
    "digits-ddpm": (1.86, 2.07, 2.21, 1.79),
    "digits-dit": (2.67,),
    "digits-ldm": (1.78,),
    "digits-sd": (1.95,),
}
"""Distances of full precision (or of a report's reference) with the noise of version 0.1, which tells reports of it."""

NUMBER = re.compile(r"(?<![\w./-])\d+(?:,\d{3})*\.\d+(?!\.?\d)|\b\d+(?:,\d{3})*(?= (?:dB|MB|MiB|GB|GiB|%|ms)\b)")
"""Numbers of README that state a measurement: with a decimal point, or in front of a unit."""


TERRAIN_ROWS = (
    ("dqtool 8/8", "8/8 default"),
    ("dqtool 4/8", "4/8 default"),
    ("dqtool 4/4", "4/4 default"),
    ("dqtool 4/4, trained", "4/4 trained"),
    ("dqtool 4/16, weights alone", "4/16"),
    ("SDNQ int4, weights alone", "SDNQ 4"),
    ("8 bits in every layer", "8/8 uniform"),
    ("onnxruntime, dynamic int8", "onnxruntime dynamic"),
    ("onnxruntime, static int8", "onnxruntime static"),
    ("NNCF int8", "NNCF"),
)
"""Rows of README's table of the terrain model, and their names in the result."""


def load(path: Path) -> dict[str, Any]:
    """Read one result."""
    return json.loads(path.read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def command_of(path: Path) -> str:
    """Return the command that makes a result: the recorded one, or its make target."""
    result = load(path) if path.suffix == ".json" else {}
    if "command" in result:
        return f"`{result['command']}`"
    name = path.stem
    if name in COMMANDS:
        return COMMANDS[name] if "`" in COMMANDS[name] else f"`{COMMANDS[name]}`"
    recipe = re.sub(r"(.*)-ptq-(w\da\d)", r"\1-\2-ptq", name)
    if not (ROOT / "recipes" / f"{recipe.removesuffix('-ptq')}.yaml").is_file():
        raise SystemExit(f"{path}: no command is known that makes this result. Add it to COMMANDS in {__file__}.")
    return f"`make {recipe}`"


def noise_of(name: str, result: Mapping[str, Any]) -> str:
    """Return the version whose noise a report or comparison was made with: `0.1` or `0.2`.

    Tables of 0.2 record how each cell was made. Reports tell by the distance of full precision, which has another value
    with other noise.
    """
    if str(result.get("format", "")).startswith("dqtool-table"):
        return "0.2" if any(row.get("made_by") for row in result["rows"]) else "0.1"
    full = result["metrics"].get("reference", {}).get(distance_name(result["metrics"]))
    model = next((model for model in MODELS if name.startswith(model)), "")
    return "0.1" if full is None or round(full, 2) in EARLIER_NOISE.get(model, ()) else "0.2"


def as_specified(path: Path, result: Mapping[str, Any]) -> bool:
    """Return whether a comparison has the rows, groups and columns that its YAML file specifies now."""
    from dqtool.tables.spec import load_table

    table = load_table(ROOT / "recipes" / "tables" / f"{path.stem}.yaml")
    rows = {row["name"] for row in result["rows"]} - {"full precision"}
    columns = tuple(column["key"] for column in result["columns"])
    return rows == {row.name for row in table.rows} and columns == table.columns


def targets() -> set[str]:
    """Return the targets of the Makefile, with those that it makes of recipes and tables."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = set(re.findall(r"^([a-z][\w-]*):", text, re.MULTILINE))
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    return found | recipes | {f"{name}-ptq" for name in recipes} | tables()


def tables() -> set[str]:
    """Return the names of the comparisons that have a YAML file."""
    return {path.stem for path in (ROOT / "recipes" / "tables").glob("*.yaml")}


def wrong_command(path: Path, command: str) -> str | None:
    """Return what is wrong with the command that the index names for the result at `path`; None for nothing."""
    words = command.strip("`").replace("`", "").split()
    result = load(path) if path.suffix == ".json" else {}
    if words[0] == "make":
        target = words[1].rstrip(",")
        if target not in targets():
            return f"{target} is no target of the Makefile"
        recorded = str(result.get("command", ""))
        if "dqtool.tables" in recorded and f"{target}.yaml" not in recorded:
            return f"the result records `{recorded}`, and the index says `make {target}`"
        name = path.stem.replace("-ptq-w", "-w") + ("-ptq" if "-ptq-w" in path.stem else "")
        return (
            None
            if name.startswith((target, target.removesuffix("-ptq"))) or target in KNOWN_TARGETS
            else (f"`make {target}` does not write it")
        )
    script = next((word for word in words if word.endswith(".py")), None)
    if script is not None and not (ROOT / script).is_file():
        return f"there is no {script}"
    return None if words[0] in ("dqtool", "python") else f"`{command}` is no command of this repository"


KNOWN_TARGETS = {
    "bench-pipeline",
    "dilate-cost",
    "full-size",
    "same-integers",
    "fuzz",
    "soak",
    "soak-large",
    "terrain",
    "terrain-speed",
    "table-correction",
    "lsq-points",
}
"""Targets whose results have other names than a recipe or a table."""


def distance_name(metrics: Mapping[str, Any]) -> str:
    """Return the name of the Fréchet distance that a report has: that of the model's own classifier."""
    return "fd.garments" if "fd.garments" in metrics else "fd.digits"


def reports() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the metrics of each committed report of `dqtool eval`."""
    for path in sorted(RESULTS.glob("*.json")):
        result = load(path)
        if result.get("stage") == "eval":
            yield path.stem, result


def quality_index() -> list[str]:
    """Return the table of all reports of `dqtool eval`."""
    rows = []
    for name, report in reports():
        metrics = report["metrics"]
        distance = distance_name(metrics)
        full = metrics.get("reference", {}).get(distance)
        cost = metrics.get("cost", {})
        given = metrics.get(f"{distance}_from_reference")
        rows.append(
            [
                f"[{name}]({name}.json)",
                str(metrics["samples"]),
                f"{metrics[distance]:.2f}",
                "" if full is None else f"{full:.2f}",
                "" if full is None else f"{metrics[distance] / full:.2f}x",
                "" if given is None else f"{given:.2f}",
                f"{metrics['psnr']['mean']:.1f} dB",
                f"{cost['size_ratio']:.1f}x" if cost else "",
                f"{cost['bops_ratio']:.1f}x" if cost else "",
                noise_of(name, report),
                command_of(RESULTS / f"{name}.json"),
            ]
        )
    head = ["report", "images", "distance", "full precision", "ratio", "to full precision", "PSNR", "smaller"]
    return table([*head, "fewer BOPs", "noise of", "command"], rows)


def comparison_index() -> list[str]:
    """Return the table of all comparisons."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        result = load(path)
        if str(result.get("format", "")).startswith("dqtool-table"):
            seeds = ", ".join(map(str, result["seeds"]))
            noise = noise_of(path.stem, result)
            made = noise if as_specified(path, result) else f"{noise}, an earlier form of the table"
            cells = f"{result['cells']['finished']} of {result['cells']['all']}"
            link, command = f"[{path.stem}]({path.stem}.md)", f"`make {path.stem}`"
            rows.append([link, result["title"], str(result["source"]), seeds, cells, made, command])
    return table(["result", "compares", "paper", "seeds", "cells", "made with", "command"], rows)


def contender_of(measured: Mapping[str, Any]) -> str:
    """Return the present name of what was timed."""
    return EARLIER_NAMES.get(measured["contender"], measured["contender"])


def speed_rows(path: Path) -> Iterator[list[str]]:
    """Yield for each batch size the speedups of contenders over the faster float32, and the time of float32."""
    result = load(path)
    machine = result["machine"]
    flags = [flag for flag in machine["flags"] if flag in ("avx2", "avx512f", "avx512_vnni", "amx_int8", "amx_tile")]
    for batch, measured in result["speed"].items():
        speedups = ", ".join(f"{contender_of(m)} {m['ratio']:.2f}x" for m in measured if not m["baseline"])
        base = next(m["median"] for m in measured if m["baseline"])
        yield [
            f"[{path.stem}]({path.stem}.md)",
            f"{machine['processor']}, {machine['threads']} threads ({', '.join(flags)})",
            batch,
            speedups,
            f"{1000 * base:.1f} ms",
            command_of(path),
        ]


def speed_index() -> list[str]:
    """Return the table of all benchmarks of a step."""
    rows = [row for path in sorted(RESULTS.glob("bench-*.json")) for row in speed_rows(path)]
    return table(["result", "machine", "batch", "times faster than float32", "float32", "command"], rows)


def other_index() -> list[str]:
    """Return the table of all other results."""
    named = {
        path.stem
        for path in RESULTS.glob("*.json")
        if (found := load(path)).get("stage") == "eval"
        or str(found.get("format", "")).startswith("dqtool-table")
        or path.stem.startswith("bench-")
    }
    rows = []
    for path in sorted(RESULTS.glob("*.md")):
        if path.stem not in named and path != INDEX:
            title = next(
                (line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")),
                path.stem,
            )
            source = path.with_suffix(".json") if path.with_suffix(".json").is_file() else path
            rows.append([f"[{path.stem}]({path.name})", title, command_of(source)])
    return table(["result", "what it shows", "command"], rows)


def index() -> str:
    """Return the text of `recipes/results/README.md`."""
    parts = [
        ["# Committed results", "", "Written by `python recipes/index_results.py` from the files in this folder."],
        ["## Quality: reports of `dqtool eval`", ""],
        [
            "Same noise for both networks. *Distance* is the Fréchet distance to the training images on the features of a small",
            "classifier (fd.digits, fd.garments); it depends on the number of images. *To full precision* is the same to the images",
            "that the full-precision model makes of the same noise. Paired images keep it below the distance between two sets",
            "of full-precision images with different seeds. *Noise of* is the version whose noise a report was made with:",
            "distances with different noise don't compare, since full precision itself has another one.",
        ],
        quality_index(),
        [
            "## Comparisons",
            "",
            "*Made with* 0.1: code and noise of version 0.1. An earlier form of a table has other rows or columns than its",
            "target makes now.",
        ],
        comparison_index(),
        ["## Speed of a step", "", "Ratios to the faster memory format of eager float32, measured in the same run."],
        speed_index(),
        ["## Everything else"],
        other_index(),
    ]
    return "\n\n".join("\n".join(part).strip("\n") for part in parts) + "\n"


def quality_table() -> list[str]:
    """Return the quality table of README.md: every embedded model at 4/4, and with calibration alone."""
    found = dict(reports())
    rows = []
    for model in MODELS:
        ours, plain = found[f"{model}-w4a4"]["metrics"], found[f"{model}-ptq-w4a4"]["metrics"]
        six, distance = found[f"{model}-w6a6"]["metrics"], distance_name(ours)
        rows.append(
            [
                f"`{model}`",
                f"{ours['reference'][distance]:.2f}",
                f"{plain[distance]:.2f}",
                f"{ours[distance]:.2f}",
                f"{plain['psnr']['mean']:.1f} dB",
                f"{ours['psnr']['mean']:.1f} dB",
                f"{six['psnr']['mean']:.1f} dB",
                f"{ours['cost']['size_ratio']:.1f}x",
            ]
        )
    head = ["model", "distance, full precision", "PTQ 4/4", "dqtool 4/4", "PSNR, PTQ 4/4", "dqtool 4/4", "dqtool 6/6"]
    return table([*head, "smaller at 4/4"], rows)


def terrain_table() -> list[str]:
    """Return the table of README.md about a model that others trained: PSNR and size of each contender."""
    found = {row["name"]: row for row in load(RESULTS / "terrain.json")["rows"] if row["steps"] == 1}
    rows = []
    for label, name in TERRAIN_ROWS:
        row = found[name]
        size = f"{row['bytes'] / 1e6:.2f} MB"
        rows.append([label, f"{row['psnr']:.1f} dB", f"{row['psnr_least']:.1f} dB", size])
    return table(["one step", "PSNR", "worst map", "file"], rows)


def peers_table(small: Path, large: Path) -> list[str]:
    """Return the speed table of README.md from `make bench-peers`: one step at both sizes, each contender alone."""
    alone = [{row["contender"]: row for row in next(iter(load(path)["alone"].values()))} for path in (small, large)]
    rows = []
    for name, row in sorted(alone[1].items(), key=lambda item: item[1]["wall"]):
        other = alone[0].get(name)
        cells = [f"{r['ratio']:.2f}x" if r else "" for r in (other, row)]
        sizes = [f"{row[k] / 2**20:.0f} MiB" if row[k] else "" for k in ("peak_bytes", "file_bytes")]
        rows.append([name, *cells, f"{row['wall']:.2f} s", f"{row['processor']:.2f} s", *sizes])
    return table(["Stable Diffusion v1.4", "256x256", "512x512", "step", "processors", "peak memory", "file"], rows)


def speed_table() -> list[str]:
    """Return the speed table of README.md."""
    small, large = (RESULTS / f"bench-peers-sd14-{size}.json" for size in (32, 64))
    if small.is_file() and large.is_file():
        return peers_table(small, large)
    shown = {"cpu": "cpu", "openvino": "openvino", "NNCF int8": "nncf-int8", "bfloat16": "bf16-channels-last"}
    names = (("DDPM CIFAR-10", "bench-cifar10-vnni"), ("Stable Diffusion v1.4", "bench-sd14-vnni"))
    rows = []
    for label, name in (*names, ("DiT-XL/2", "bench-dit-xl2-vnni")):
        result = load(RESULTS / f"{name}.json")
        batch, measured = next(iter(result["speed"].items()))
        by_name = {contender_of(m): m for m in measured}
        base = next(m["median"] for m in measured if m["baseline"])
        best = {k: by_name.get(v, by_name.get("bf16" if v.startswith("bf16") else v)) for k, v in shown.items()}
        cells = [f"{m['ratio']:.2f}x" if m else "" for m in best.values()]
        rows.append([label, batch, *cells, f"{1000 * base:.1f} ms"])
    return table(
        ["network at full size", "batch", *(f"`{n}`" if n in ("cpu", "openvino") else n for n in shown), "float32"],
        rows,
    )


def with_tables(text: str) -> str:
    """Return README.md's text with the marked tables replaced."""
    tables = {"terrain": terrain_table(), "quality": quality_table(), "speed": speed_table()}
    for name, lines in tables.items():
        mark = re.compile(rf"(<!-- results: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not mark.search(text):
            raise SystemExit(f"README.md lacks the mark <!-- results: {name} -->")
        text = mark.sub(lambda m, lines=lines: f"{m[1]}{chr(10).join(lines)}\n{m[2]}", text)
    return text


def unsupported(readme: str, results: str) -> list[str]:
    """Return the measurements in README that no result holds. Code, links and versions do not count as measurements."""
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv \S+", " ", readme, flags=re.DOTALL)
    known = set(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", results))
    return sorted({number for number in NUMBER.findall(prose) if number not in known})


def problems() -> list[str]:
    """Return a sentence for each file or number that differs from the results."""
    found = []
    readme = README.read_text(encoding="utf-8")
    if not INDEX.is_file() or INDEX.read_text(encoding="utf-8") != index():
        found.append(f"{INDEX.relative_to(ROOT)} is out of date")
    if with_tables(readme) != readme:
        found.append("the tables of README.md are out of date")
    texts: Mapping[Path, str] = {path: path.read_text(encoding="utf-8") for path in sorted(RESULTS.glob("*.md"))}
    held = "\n".join(texts.values())
    for path in (README, ROOT / "recipes" / "README.md"):
        told = unsupported(path.read_text(encoding="utf-8"), held)
        found += [f"{path.relative_to(ROOT)} says {number}, which is in no result" for number in told]
    for path in results():
        is_table = path.suffix == ".json" and str(load(path).get("format", "")).startswith("dqtool-table")
        wrong = wrong_command(path, f"make {path.stem}" if is_table else command_of(path))
        found += [f"{path.relative_to(ROOT)}: {wrong}"] if wrong else []
    return found


def results() -> list[Path]:
    """Return the file of each committed result: its JSON, else its Markdown or picture."""
    found: dict[str, Path] = {}
    for suffix in (".png", ".svg", ".md", ".json"):
        found |= {path.stem: path for path in RESULTS.glob(f"*{suffix}") if path != INDEX}
    return [found[name] for name in sorted(found)]


def main() -> int:
    """Write the files, or with --check print the problems; return the exit code."""
    if sys.argv[1:] == ["--check"]:
        found = problems()
        print(
            "\n".join([*found, "run `python recipes/index_results.py`"] if found else ["README.md and the index hold"])
        )
        return 1 if found else 0
    INDEX.write_text(index(), encoding="utf-8")
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
