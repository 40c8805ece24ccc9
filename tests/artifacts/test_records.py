"""Manifests whose checksum is right and whose values are not are refused, with the key."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from helpers import resigned

from dqtool.artifacts import Manifest, open_artifact, read_manifest
from dqtool.artifacts.completeness import check_complete
from dqtool.artifacts.manifest import canonical_json
from dqtool.artifacts.records import ModelRecord, SamplingRecord, ScalingRecord
from dqtool.artifacts.schema import record, without
from dqtool.errors import ArtifactError

FILES = {
    "dilate": "dilated.safetensors",
    "calibrate": "calibrated.safetensors",
    "distill": "distilled.safetensors",
    "export": "exported",
}


def note_of(chain: Path, stage: str) -> Path:
    path = chain / FILES[stage]
    return path / "dqtool.json" if path.suffix == "" else path.with_suffix(".json")


@pytest.mark.parametrize("stage", FILES)
def test_what_stages_write_passes(made: Path, stage: str):
    artifact = open_artifact(made / FILES[stage], [stage])
    check_complete(artifact.manifest, "here")
    assert artifact.manifest.network.class_name == "UNet2DModel"
    written = json.loads(note_of(made, stage).read_text())
    assert [layer.name for layer in artifact.manifest.layers] == [layer["name"] for layer in written["layers"]]
    assert json.loads(artifact.manifest.to_json()) == written


EDITS = [
    ("dilate", ("model", "class"), 5),
    ("dilate", ("model", "config"), []),
    ("dilate", ("model",), {}),
    ("dilate", ("layers", 0, "shape"), [0, 1]),
    ("dilate", ("layers", 0, "shape"), [1] * 9),
    ("dilate", ("layers", 0, "kind"), "conv3d"),
    ("dilate", ("layers", 0, "macs"), -1),
    ("dilate", ("layers", 0, "name"), ""),
    ("dilate", ("layers", 0, "groups"), 0),
    ("dilate", ("layers", 1, "name"), "time_embedding.linear_1"),
    ("dilate", ("layers", 0, "shares"), "nothing"),
    ("dilate", ("metrics", "blocks"), []),
    ("dilate", ("metrics", "blocks"), None),
    ("dilate", ("metrics", "blocks", 0, "reads"), ["nothing"]),
    ("dilate", ("metrics", "output_reads"), ["nothing"]),
    ("dilate", ("metrics", "scaling_in_calibrate"), {"scaling": "auto"}),
    ("dilate", ("pipeline", "model_index", "unet"), ["diffusers"]),
    ("dilate", ("pipeline", "model_index"), [1]),
    ("dilate", ("pipeline", "component"), 5),
    ("dilate", ("environment", "versions"), [1]),
    ("calibrate", ("pipeline", "sampling", "steps"), 0),
    ("calibrate", ("pipeline", "sampling", "steps"), 10**10),
    ("calibrate", ("pipeline", "sampling", "eta"), "x"),
    ("calibrate", ("pipeline", "sampling"), None),
    ("calibrate", ("pipeline",), None),
    ("calibrate", ("metrics", "samples_per_step"), "x"),
    ("distill", ("layers", 0, "bits"), [4]),
    ("distill", ("layers", 0, "bits"), [4, 9]),
    ("distill", ("layers", 0, "bits"), None),
    ("distill", ("layers", 0, "dilated"), "yes"),
    ("export", ("parameters", "format"), 5),
    ("export", ("parameters",), {}),
    ("export", ("layers", 0), 7),
]


@pytest.mark.parametrize(("stage", "path", "value"), EDITS, ids=lambda each: str(each)[:40])
def test_a_manifest_whose_checksum_is_right_and_a_value_is_not(chain: Path, stage: str, path: tuple, value: Any):
    note = note_of(chain, stage)
    content = json.loads(note.read_text())
    holder: Any = content
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    resigned(note, content)
    with pytest.raises(ArtifactError, match="malformed") as caught:
        open_artifact(chain / FILES[stage], [stage])
    assert str(path[0]) in str(caught.value)


@pytest.mark.parametrize("stage", FILES)
def test_manifests_changed_at_random_are_read_or_refused(made: Path, stage: str):
    original = json.loads(note_of(made, stage).read_text())
    generator = random.Random(0)
    values = [None, True, 0, -1, 10**15, 1.5, "", "x", [], {}, [[]], ["a", "b"], {"a": 1}]
    refused = 0
    for _ in range(300):
        content = copy.deepcopy(original)
        holder: Any = content
        key: Any = None
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = generator.choice(keys)
            if not isinstance(holder[key], dict | list) or generator.random() < 0.2:
                break
            holder = holder[key]
        if key is None or (isinstance(holder, dict | list) and not holder):
            continue
        holder[key] = generator.choice(values)
        content.pop("checksum", None)
        import hashlib

        content["checksum"] = hashlib.sha256(canonical_json(content).encode()).hexdigest()
        try:
            manifest = Manifest.from_json(json.dumps(content), "here")
            check_complete(manifest, "here")
        except ArtifactError as error:
            refused += 1
            assert len(str(error)) <= 500
    assert refused > 50
    assert read_manifest(made / FILES[stage]).stage == stage


def test_what_was_read_is_written_again_with_what_was_changed() -> None:
    read = record({"method": "wd", "max": 2, "later": [1, {"a": None}], "asked": None}, ScalingRecord)
    assert read.to_json() == {"method": "wd", "max": 2, "later": [1, {"a": None}], "asked": None}
    changed = dataclasses.replace(read, max=3.0, learned=True)
    assert changed.to_json() == {**read.to_json(), "max": 3.0, "learned": True}
    assert dataclasses.replace(changed, learned=False).to_json() == {**read.to_json(), "max": 3.0}
    assert without(read, "max").to_json() == {"method": "wd", "later": [1, {"a": None}], "asked": None}
    assert read == ScalingRecord("wd", 2)


def test_a_record_made_in_code_leaves_out_what_says_nothing() -> None:
    assert ModelRecord("A", {"x": 1}, "a", "here").to_json() == {
        "class": "A",
        "config": {"x": 1},
        "family": "a",
        "source": "here",
    }
    assert SamplingRecord({}, 4, 0.0).to_json() == {"scheduler": {}, "steps": 4, "eta": 0.0, "sampler": None}
