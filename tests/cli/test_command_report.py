from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run
from helpers import load_json, refused
from pytest_console_scripts import ScriptRunner

CHECK = Path(__file__).parents[1] / "browser" / "check_page.py"


def test_writes_one_page_and_prints_its_path(run: Run, chain: Path):
    result = run("report", ".", "-o", "page.html", cwd=chain)
    assert (result.returncode, result.stdout) == (0, "page.html\n"), result.stderr
    assert (chain / "page.html").read_text().startswith("<!doctype html>")
    assert not [path for path in chain.iterdir() if path.name.startswith(".page")]


def test_takes_the_path_that_eval_prints(chain: Path):
    shutil.move(chain / "eval.json", chain / "other.json")
    (chain / "line").write_text("other.json\n")
    terminal = os.dup(0)
    try:
        with open(chain / "line") as line:
            os.dup2(line.fileno(), 0)
            runner = ScriptRunner("inprocess", ".")
            command = ["dqtool", "report", "--format", "md", "--quiet"]
            result = runner.run(command, cwd=chain, stdin=line, print_result=False)
    finally:
        os.dup2(terminal, 0)
        os.close(terminal)
    assert (result.returncode, result.stdout) == (0, "report.md\n"), result.stderr
    assert "| 1 | other |" in (chain / "report.md").read_text()


def test_json_and_dry_run(run: Run, chain: Path):
    plan = load_json(run("report", ".", "--dry-run", "--json", cwd=chain).stdout)
    assert plan["output"] == "report.html"
    assert plan["results"][0]["artifacts"] == ["calibrate", "dilate", "distill", "export"]
    assert "would write report.html" in run("report", ".", "--dry-run", cwd=chain).stdout
    assert not (chain / "report.html").exists()
    assert load_json(run("report", "eval.json", "--json", "--quiet", cwd=chain).stdout) == {
        "cached": False,
        "path": "report.html",
    }


def test_faults(run: Run, chain: Path):
    assert "gone" in refused(run, chain, 4, "report", "gone")
    assert "dqtool eval" in refused(run, chain, 3, "report", "tiny")
    assert "not an eval result" in refused(run, chain, 3, "report", "distilled.safetensors")
    assert "pdf" in refused(run, chain, 2, "report", ".", "--format", "pdf")
    assert "mkdir" in refused(run, chain, 4, "report", ".", "-o", "no/where.html")
    assert "name" in refused(run, chain, 2, "report", ".", "-o", "eval.json")
    (chain / "eval.json").write_text("{")
    assert "eval.json" in refused(run, chain, 3, "report", ".")


@pytest.mark.skipif(not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), reason="no Chromium")
def test_the_browser_check_passes_a_page_and_catches_a_bad_one(run: Run, chain: Path):
    assert run("report", ".", cwd=chain).returncode == 0
    good = subprocess.run([sys.executable, CHECK, "report.html"], cwd=chain, capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    bad = '<!doctype html><title>x</title><svg><path d="nonsense"/></svg><div style="width:3000px">x</div>'
    bad += "<script>console.error('ouch')</script><img src='http://127.0.0.1:9/x.png'>"
    (chain / "bad.html").write_text(bad)
    caught = subprocess.run([sys.executable, CHECK, "bad.html"], cwd=chain, capture_output=True, text=True)
    assert caught.returncode == 1
    for complaint in ("ouch", "request to http://127.0.0.1:9", "wider than the window", "attribute d", "without title"):
        assert complaint in caught.stderr


def test_the_browser_check_says_what_to_install(chain: Path):
    (chain / "page.html").write_text("")
    done = subprocess.run(
        [sys.executable, CHECK, "page.html"],
        cwd=chain,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": "/none"},
    )
    assert done.returncode == 4
    assert "apt-get install chromium" in done.stderr
