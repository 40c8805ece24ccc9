from __future__ import annotations

from pathlib import Path

from conftest import Run


def test_writes_a_picture_that_depends_on_the_seed_alone(run: Run, chain: Path):
    for name, seed in (("a.png", "0"), ("b.png", "0"), ("c.png", "1")):
        result = run("sample", "exported", "-n", "3", "--seed", seed, "-o", name, "--batch-size", "2", cwd=chain)
        assert (result.returncode, result.stdout) == (0, f"{name}\n"), result.stderr
    first, second, third = ((chain / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert first.startswith(b"\x89PNG")
    assert first == second != third


def test_wants_an_exported_directory(run: Run, chain: Path):
    assert run("sample", "distilled.safetensors", cwd=chain).returncode == 3
    assert run("sample", "tiny", cwd=chain).returncode == 3
    assert run("sample", "exported", "--runtime", "abacus", cwd=chain).returncode == 2
    assert run("sample", "exported", "-n", "0", cwd=chain).returncode == 2
    assert not (chain / "samples.png").exists()
