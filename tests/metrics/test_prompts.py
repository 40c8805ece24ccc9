from __future__ import annotations

import json
from pathlib import Path

import pytest

from dqtool.errors import ArtifactError, EnvironmentFault
from dqtool.metrics.prompts import read_prompts


def written(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_one_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "p.txt", "\ufeffa cat, black\n\n  a dog \r\nein Bär")
    assert read_prompts(path) == ["a cat, black", "a dog", "ein Bär"]
    assert read_prompts(path, 2) == ["a cat, black", "a dog"]


def test_drawbench_and_parti(tmp_path: Path) -> None:
    csv = 'Prompts,Category\nA red coloured car.,Colors\n"A ""big"" dog,\nand a cat",Counting\n'
    assert read_prompts(written(tmp_path, "drawbench.csv", csv)) == ["A red coloured car.", 'A "big" dog,\nand a cat']
    tsv = "Prompt\tCategory\tChallenge\nbond\tAbstract\tBasic\n"
    assert read_prompts(written(tmp_path, "PartiPrompts.tsv", tsv)) == ["bond"]
    assert read_prompts(written(tmp_path, "single.csv", "a horse\na cow\n")) == ["a horse", "a cow"]
    with pytest.raises(ArtifactError, match="No column"):
        read_prompts(written(tmp_path, "other.csv", "a,b\n1,2\n"))


def test_only_newlines_end_a_prompt(tmp_path: Path) -> None:
    text = "a cat\u2028on a mat\r\na\x85dog\x0cand a\x1ccow\n"
    prompts = ["a cat\u2028on a mat", "a\x85dog\x0cand a\x1ccow"]
    for name, head in (("p.txt", ""), ("p.csv", "prompt\n"), ("p.tsv", "prompt\n")):
        assert read_prompts(written(tmp_path, name, head + text)) == prompts


@pytest.mark.parametrize(
    "rows",
    [
        '"a cat\tx\na dog\ty\na cow\tz\n',
        '"a cat\tx\na dog\ty\n"a cow"\tz\n',
        f"{'a' * 131073}\tx\n",
    ],
)
def test_a_row_that_can_not_be_read_is_named(tmp_path: Path, rows: str) -> None:
    """A quote that is never closed would take in the rows that follow."""
    path = written(tmp_path, "p.tsv", 'prompt\tkind\n"two\nlines"\tx\n' + rows)
    with pytest.raises(ArtifactError) as caught:
        read_prompts(path)
    assert f"{path}:4" in str(caught.value)


def test_coco_gives_one_caption_an_image(tmp_path: Path) -> None:
    annotations = [
        {"image_id": image, "id": 10 * image + n, "caption": f"caption {n}\nof {image} "}
        for n in (2, 1)
        for image in range(50)
    ]
    path = written(tmp_path, "captions_val2014.json", json.dumps({"annotations": annotations, "images": []}))
    assert read_prompts(path) == [f"caption 1 of {image}" for image in range(50)]
    some = read_prompts(path, 10, seed=3)
    assert len(set(some)) == 10
    assert some == read_prompts(path, 10, seed=3) != read_prompts(path, 10, seed=4)
    assert read_prompts(written(tmp_path, "list.json", '["a", "b"]')) == ["a", "b"]


def test_files_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault):
        read_prompts(tmp_path / "missing.txt")
    for name, text in (
        ("empty.txt", " \n"),
        ("empty.csv", ""),
        ("bad.json", "{"),
        ("bad2.json", '{"annotations": [1]}'),
    ):
        with pytest.raises(ArtifactError):
            read_prompts(written(tmp_path, name, text))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="UTF-8"):
        read_prompts(tmp_path / "binary.txt")
