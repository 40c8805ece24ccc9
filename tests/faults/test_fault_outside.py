"""Inspecting, loading and timing an export read nothing else: no original model, no artifact of an earlier stage."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WATCH = """
import os, sys
home = os.path.realpath(os.getcwd())
def watch(event, arguments):
    if event == 'open' and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        inside = path.startswith(os.path.join(home, 'exported') + os.sep) or path.endswith('.__path_hook__')
        if path.startswith(home + os.sep) and not inside and os.path.exists(path):
            print('READ', path, file=sys.stderr)
sys.addaudithook(watch)
"""
COMMANDS = {
    "inspect": "import sys; sys.argv = ['dqtool', 'inspect', 'exported']; import dqtool.__main__ as m; code = m.main()",
    "load": "import dqtool; dqtool.load('exported', runtime='auto'); code = 0",
    "from_pretrained": (
        "import dqtool; from diffusers import DiffusionPipeline; DiffusionPipeline.from_pretrained('exported'); code = 0"
    ),
    "bench": (
        "import sys; sys.argv = ['dqtool', 'bench', 'exported', '--runtime', 'auto', '--seconds', '0.2', '--no-memory'];"
        " import dqtool.__main__ as m; code = m.main()"
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_beside_the_export_is_read(chain: Path, command: str, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    environment = {**os.environ, "DQTOOL_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    kernels = Path(os.environ["DQTOOL_CACHE"]) / "kernels"  # kernels are compiled once for all tests
    if kernels.exists():
        shutil.copytree(kernels, tmp_path / "cache" / "kernels")
    code = f"{WATCH}\n{COMMANDS[command]}\nprint('CODE', code, file=sys.stderr)"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=chain, capture_output=True, text=True, env=environment, check=False
    )
    assert "CODE 0" in found.stderr, found.stderr
    assert [line for line in found.stderr.splitlines() if line.startswith("READ")] == []
