from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from dqtool import report


@pytest.fixture(autouse=True)
def not_quiet() -> Iterator[None]:
    report.set_quiet(False)
    yield
    report.set_quiet(False)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "FIRST_LINE", 0.05)
    monkeypatch.setattr(report, "LINE_EVERY", 0.1)


def on_a_terminal(code: str, columns: int = 100) -> tuple[str, str]:
    """Return the text that `code` shows on a pseudo terminal as its standard error, and its standard output."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", f"from dqtool.report import *\n{code}"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env=os.environ | {"COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux reports a closed other end this way
            break
        if not part:
            break
        shown += part
    out, _ = process.communicate()
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    return shown.decode(), out


class TestPlain:
    def test_everything_goes_to_standard_error(self, capsys: pytest.CaptureFixture[str], fast: None):
        report.say("[bold]hello[/bold]")
        report.warn("careful")
        report.table("Layers", ["name", "bits"], [["conv_in", 8]])
        with report.progress("calibrate", 2) as p:
            p.advance(2)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("[bold]hello[/bold]\nwarning: careful\nLayers\n")

    def test_quiet_silences_all_but_warnings(self, capsys: pytest.CaptureFixture[str], fast: None):
        report.set_quiet(True)
        report.say("hello")
        report.table("Layers", ["name"], [["conv_in"]])
        with report.progress("calibrate", 2) as p:
            p.advance()
            time.sleep(0.1)
        report.warn("careful")
        assert capsys.readouterr().err == "warning: careful\n"

    def test_first_line_comes_although_nothing_advances(self, capsys: pytest.CaptureFixture[str], fast: None):
        with report.progress("distill", 100, unit="block"):
            time.sleep(0.3)
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "distill 0/100 block  elapsed 0s  eta ?"
        assert 2 <= len(lines) <= 5

    def test_the_first_line_is_due_within_two_seconds_and_then_every_five(self):
        assert report.FIRST_LINE <= 2 and 4 <= report.LINE_EVERY <= 6

    def test_many_steps_make_few_lines_and_the_last_one_is_complete(
        self, capsys: pytest.CaptureFixture[str], fast: None
    ):
        with report.progress("calibrate", 1000) as p:
            for step in range(1000):
                p.advance(note=f"loss {step}")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) < 10 and lines[-1] == "calibrate 1000/1000 step  elapsed 0s  loss 999"

    def test_an_interrupt_is_seen_in_the_last_line(self, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(KeyboardInterrupt), report.progress("calibrate", 10) as p:
            p.advance(3)
            raise KeyboardInterrupt
        assert capsys.readouterr().err == "calibrate 3/10 step  elapsed 0s  stopped\n"

    def test_unknown_total(self, capsys: pytest.CaptureFixture[str]):
        with report.progress("load", None, unit="file") as p:
            p.advance(4)
        assert capsys.readouterr().err == "load 4 file  elapsed 0s\n"

    def test_eta_counts_the_speed_of_this_run_only(self, monkeypatch: pytest.MonkeyPatch):
        p = report.progress("distill", 10)
        assert p.eta is None
        p.skip(4)
        assert p.eta is None and "4/10" in p.line() and "eta ?" in p.line()
        p.advance(2)
        monkeypatch.setattr(report.Progress, "elapsed", 30.0)
        assert p.eta == 60.0 and p.line() == "distill 6/10 step  elapsed 30s  eta 1m00s"

    def test_table_is_aligned_and_never_cut(self, capsys: pytest.CaptureFixture[str]):
        name = "down_blocks.0.attentions.0." * 10
        report.table("T", ["layer", "value", "note"], [[name, 0.125, None], ["b", 123456.0, "x"], ["c", -7, ""]])
        title, header, rule, *rows = capsys.readouterr().err.splitlines()
        assert title == "T" and header.split() == ["layer", "value", "note"] and set(rule) == {"-", " "}
        assert rows[0] == f"{name}   0.125  -" and rows[1].endswith("  123456  x") and rows[2].endswith("      -7")

    def test_messages_to_a_reader_that_is_gone_do_not_end_the_run(self):
        code = "from dqtool.report import say\nfor _ in range(100): say('x' * 1000)\nprint('done')"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None and process.stderr is not None
        process.stderr.close()
        assert process.stdout.read() == b"done\n"
        process.wait()

    def test_rich_is_not_imported(self):
        code = (
            "import sys\nfrom dqtool.report import *\nsay('a'); table('t', ['a'], [[1]])\n"
            "with progress('a', 1) as p: p.advance()\nassert 'rich' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


class TestTerminal:
    def test_bar_with_count_and_eta(self):
        shown, out = on_a_terminal(
            "import time\nwith progress('calibrate', 4) as p:\n for i in range(4): p.advance(note=f'loss {i}'); "
            "time.sleep(0.15)\n say('[a]')\nprint('path')"
        )
        assert "calibrate" in shown and "━" in shown and re.search(r"[123]/4 step  elapsed \d+s  eta \d+s", shown)
        assert "4/4 step" in shown and "loss 3" in shown and "[a]" in shown
        assert out == "path\n"

    def test_nested_bars_share_the_terminal(self):
        shown, _ = on_a_terminal(
            "with progress('blocks', 2) as a:\n for _ in range(2):\n  with progress('inner', 3) as b: b.advance(3)\n"
            "  a.advance()"
        )
        assert "inner" in shown and "2/2 step" in shown

    def test_table_in_a_frame_or_plain_where_the_terminal_is_too_narrow(self):
        code = "table('Layers', ['name', 'value'], [['conv_in', 3.14159], ['[b]', 12345678901]])"
        wide, _ = on_a_terminal(code)
        narrow, _ = on_a_terminal(code, columns=12)
        assert "┃" in wide and "3.14159" in wide and "[b]" in wide
        assert "┃" not in narrow and "12345678901" in narrow


def test_format_seconds():
    shown = [report.format_seconds(seconds) for seconds in (0.4, 59.4, 59.6, 125, 3599.9, 3720)]
    assert shown == ["0s", "59s", "1m00s", "2m05s", "1h00m", "1h02m"]
