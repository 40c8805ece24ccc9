"""Arguments of networks without an adapter: what an example's files hold, and the call that is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dqtool.errors import ArtifactError
from dqtool.models.families.examples import ARGUMENTS, EXAMPLE, call_arguments, draw_example, read_example

TENSORS = {
    "text": torch.randn(1, 3, 4),
    "rows": torch.randn(1, 2),
    "ids": torch.arange(6.0).view(1, 3, 2),
    "mask": torch.tensor([[True, True, False]]),
    "sizes": torch.tensor([[64.0, 32.0]]),
    "label": torch.tensor([7]),
}
PARAMETERS = dict.fromkeys(
    ("x", "text", "mask", "sizes", "label", "ids", "layers", "shapes", "frames", "options", "rows")
)
STRUCTURE: dict[str, Any] = {
    "ids": {"$shared": "ids"},
    "layers": [{"$tensor": "rows", "dim": 1}, {"$tensor": "rows", "repeat": 2}],
    "shapes": {"$each": [[1, 4, 4], {"$tensor": "rows"}]},
    "frames": 2,
    "options": {"scale": 0.5, "nothing": None},
}


def written(directory: Path, structure: Any = None) -> Path:
    save_file(TENSORS, directory / "example.safetensors")
    if structure is not None:
        (directory / "example.json").write_text(json.dumps(structure))
    return directory / "example.safetensors"


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_call_has_lists_dicts_numbers_and_tensors_of_every_kind(tmp_path: Path, suffix: str) -> None:
    config = read_example(str(written(tmp_path, STRUCTURE).with_suffix(suffix)), PARAMETERS)
    tensors = draw_example(config[EXAMPLE], 3, torch.Generator().manual_seed(0))
    assert {name: len(tensor) for name, tensor in tensors.items()} == dict.fromkeys(TENSORS, 3)
    called = call_arguments(config[ARGUMENTS], tensors, 3)
    assert set(called) == {"text", "mask", "sizes", "label", *STRUCTURE}
    assert torch.equal(called["ids"], TENSORS["ids"][0])
    first, second = called["layers"]
    assert torch.equal(first, tensors["rows"].T)
    assert torch.equal(second, tensors["rows"][[0, 0, 1, 1, 2, 2]])
    assert [each[0] for each in called["shapes"]] == [[1, 4, 4]] * 3
    assert torch.equal(torch.stack([each[1] for each in called["shapes"]]), tensors["rows"])
    assert called["frames"] == 2
    assert called["options"] == {"scale": 0.5, "nothing": None}


def test_masks_sizes_and_positions_are_the_examples_own_and_the_rest_is_random(tmp_path: Path) -> None:
    entries = read_example(str(written(tmp_path, STRUCTURE)), PARAMETERS)[EXAMPLE]
    drawn = draw_example(entries, 2, torch.Generator().manual_seed(0))
    for name in ("mask", "sizes", "ids"):
        assert torch.equal(drawn[name], TENSORS[name].expand_as(drawn[name])), name
        assert drawn[name].dtype == TENSORS[name].dtype
    assert "values" not in entries["text"]
    assert int(drawn["label"].max()) <= 7
    assert not torch.equal(drawn["text"][0], drawn["text"][1])


def test_channels_beside_the_sample_come_from_another_tensor() -> None:
    structure = {"sample": {"$concat": [{"$tensor": "sample"}, {"$tensor": "image"}], "dim": 2}}
    called = call_arguments(structure, {"sample": torch.zeros(2, 3, 4, 5), "image": torch.ones(2, 3, 1, 5)}, 2)
    assert called["sample"].shape == (2, 3, 5, 5)
    assert torch.equal(called["sample"][:, :, 4], torch.ones(2, 3, 5))
    assert set(called) == {"sample"}


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"text": {"$tensor": "nothing"}}, "no tensor 'nothing'"),
        ({"text": [{"$tensr": "text"}]}, "'\\$tensr' has no meaning"),
        ({"text": {"$shared": "text", "dim": 1}}, "'dim' has no meaning"),
        ({"strange": 1}, "takes no argument 'strange'"),
    ],
)
def test_a_wrong_example_is_refused_with_the_place(structure: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message) as error:
        read_example(str(written(tmp_path, structure)), PARAMETERS)
    assert "example.json" in str(error.value)
