"""Load time and memory in fresh processes: plausible figures, and errors that are raised again in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dqtool.artifacts import open_artifact
from dqtool.bench import probe as probing
from dqtool.bench.contenders import contender_of
from dqtool.bench.float_contenders import prepare_float
from dqtool.bench.probe import Probe, memory_status, prepare, probe
from dqtool.bench.subject import Subject
from dqtool.errors import EnvironmentFault
from dqtool.stages.bench import _subject
from dqtool.stages.options.bench import BenchOptions

MIB = 1 << 20


@pytest.fixture
def subject(made: Path, tmp_path: Path) -> Subject:
    return _subject(open_artifact(made / "exported"), BenchOptions(), str(tmp_path), 1)


ALLOCATE = """
from dqtool.bench.probe import memory_status
before = memory_status()["private"]
block = bytearray(64 << 20)
block[::4096] = b"x" * len(block[::4096])
print(memory_status()["private"] - before)
"""


def test_status_counts_allocated_memory():
    if "private" not in memory_status():
        pytest.skip("the system does not count private memory")
    # This process could take the block from memory that earlier tests freed, so that a fresh one is measured.
    done = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, check=True, timeout=120)
    assert 60 * MIB < int(done.stdout) < 80 * MIB


def test_a_runtime_is_measured_in_fresh_processes(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    requests = []
    run = probing._child
    monkeypatch.setattr(probing, "_child", lambda request: requests.append(request) or run(request))
    found = probe("simulate", subject, 2)
    assert isinstance(found, Probe)
    assert len(requests) == 2, "the first one fills the caches"
    assert 0 < found.load < found.ready < 30
    if found.peak_bytes is not None and found.private_bytes is not None:
        assert 0 < found.private_bytes <= found.peak_bytes + MIB
        assert found.peak_bytes < 300 * MIB, "the libraries themselves must not count"


def test_faults_of_the_process_are_raised_here(subject: Subject, tmp_path: Path):
    broken = Subject(**{**subject.to_json(), "directory": str(tmp_path / "nothing")})
    with pytest.raises(EnvironmentFault, match="no such file"):
        prepare("fp32", broken)


def test_a_process_that_dies_is_a_fault_with_its_last_words(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda _command, **keywords: start(
            [sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit('out of luck')"], **keywords
        ),
    )
    with pytest.raises(EnvironmentFault, match="out of luck"):
        prepare("fp32", subject)


def test_a_subject_survives_json(subject: Subject):
    assert Subject(**json.loads(json.dumps(subject.to_json()))) == subject


def test_the_float_directory_is_what_diffusers_loads(subject: Subject):
    import torch

    prepare_float(subject)
    loaded = contender_of("fp32").load(subject)
    last = contender_of("fp32-channels-last").load(subject)
    arguments = subject.inputs(2)[0]
    reference = loaded.run(arguments)
    torch.testing.assert_close(last.run(last.adapt(arguments)), reference, atol=1e-4, rtol=1e-4)
    half = contender_of("bf16").load(subject)
    assert half.run(half.adapt(arguments)).dtype == torch.bfloat16
