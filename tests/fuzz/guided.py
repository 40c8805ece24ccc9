"""Fuzz one reader by coverage with atheris, where it installs (`pip install atheris`; Linux and macOS).

    python tests/fuzz/guided.py "safetensors" -runs=100000

Arguments after the reader's name are libFuzzer's. The inputs start from the genuine file of the corpus. Anything but a
`DqtoolError` of code 2 to 5, and any write, ends the run with the input that did it. It needs no assertion of its own for
time and memory: `-timeout=1 -rss_limit_mb=...` are libFuzzer's.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dqtool"]):
    from corpus import files
    from parsers import by_bytes
    from watch import Watch

    from dqtool import report
    from dqtool.errors import DqtoolError


def main(kind: str, arguments: list[str], folder: Path) -> None:
    """Fuzz the reader `kind` until libFuzzer ends the process."""
    warnings.simplefilter("ignore")
    report.set_quiet(True)
    os.environ["DQTOOL_CACHE"] = str(folder)
    genuine, (place, read) = files()[kind], by_bytes(folder)[kind]
    place.write_bytes(genuine)
    read(place)  # imports
    seeds = folder / "seeds"
    seeds.mkdir()
    (seeds / "genuine").write_bytes(genuine)
    watch = Watch(folder)

    def once(data: bytes) -> None:
        place.write_bytes(data)
        try:
            with watch.watching(strict=True):
                read(place)
        except DqtoolError as error:
            if error.exit_code == 1 or len(str(error)) > 500 or not str(error).isprintable():
                raise RuntimeError(repr(error)) from error
        if watch.faults:
            raise RuntimeError("; ".join(watch.faults))

    atheris.Setup([sys.argv[0], *arguments, str(seeds)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(f"{__doc__}\nReaders: {', '.join(files())}")
    main(sys.argv[1], sys.argv[2:], Path(tempfile.mkdtemp()))
