from __future__ import annotations

import json
from typing import Any

import pytest

from dqtool.artifacts import FORMAT, Manifest, environment
from dqtool.artifacts.schema import unchecked
from dqtool.errors import ArtifactError, NumericError

SHA = "0" * 64


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "stage": "calibrate",
        "fingerprint": SHA,
        "inputs": [{"name": "dilated.safetensors", "sha256": SHA, "stage": "dilate"}],
        "model": {
            "class": "UNet2DModel",
            "config": {"sample_size": 16},
            "family": "unet2d",
            "source": "zoo:digits-ddpm",
        },
        "parameters": {"steps": 20, "eta": 0.1, "prompts": None},
        "layers": [{"name": "conv_in", "kind": "conv2d", "shape": [8, 1, 3, 3], "macs": 72, "bits": [8, 8]}],
        "metrics": {"range_ratio": 1 / 3},
        "environment": environment("cpu", 2),
        "seconds": 1.5,
        "file": {"name": "calibrated.safetensors", "bytes": 12, "sha256": SHA},
    }
    return unchecked(values | changes, Manifest)


def edited(**changes: Any) -> str:
    return json.dumps(json.loads(manifest().to_json()) | changes)


def test_round_trip_is_exact():
    original = manifest()
    text = original.to_json()
    parsed = Manifest.from_json(text, "x.json")
    assert parsed == original
    assert parsed.to_json() == text
    assert text.endswith("}\n") and list(json.loads(text)) == sorted(json.loads(text))


def test_holds_the_fields_of_the_design_and_a_checksum():
    assert set(json.loads(manifest().to_json())) == {
        *("format", "stage", "version", "file", "inputs", "model", "pipeline", "parameters", "layers", "metrics"),
        *("fingerprint", "environment", "seconds", "checksum"),
    }


def test_tuples_and_whole_number_keys_are_read_back_as_json_has_them():
    parsed = Manifest.from_json(manifest(metrics={2: (1, 2), 10: 3}).to_json(), "x.json")
    assert parsed.metrics.as_read == {"2": [1, 2], "10": 3}


def test_layout_may_change_but_not_a_value():
    assert Manifest.from_json(json.dumps(json.loads(manifest().to_json())), "x.json") == manifest()
    for changes in ({"parameters": {"steps": 50}}, {"seconds": 2.0}, {"layers": []}, {"stage": "distill"}):
        with pytest.raises(ArtifactError, match=r"changed after dqtool wrote it.*x\.json"):
            Manifest.from_json(edited(**changes), "x.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused_by_key(value: float):
    with pytest.raises(NumericError, match=r"key layers\[0\]\.error\[1\]"):
        manifest(layers=[{"name": "a", "kind": "linear", "shape": [1, 1], "macs": 1, "error": (0.0, value)}]).to_json()


def test_newer_format_says_upgrade():
    with pytest.raises(ArtifactError, match=r"newer dqtool.*x\.json.*Upgrade dqtool") as caught:
        Manifest.from_json(edited(format="dqtool/2", future={}), "x.json")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("value", [None, 1, "dqtool/0", "dqtool/x", "gguf/1", ["dqtool/1"]])
def test_foreign_format(value: object):
    with pytest.raises(ArtifactError, match=r"no dqtool manifest.*key format"):
        Manifest.from_json(edited(format=value), "x.json")


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"[]", b"7", b"\xff\xfe", b'{"format": NaN}', b"[" * 100_000),
        edited(seconds=0).replace('"seconds": 0', '"seconds": 1e999').encode(),
        manifest().to_json().encode()[:-40],
    ],
)
def test_what_is_no_json_object(text: bytes):
    with pytest.raises(ArtifactError, match=r"x\.json"):
        Manifest.from_json(text, "x.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage", "train"),
        ("stage", None),
        ("version", 1),
        ("inputs", {}),
        ("inputs[0]", [7]),
        ("inputs[0]", [{"sha256": SHA, "stage": None}]),
        ("inputs[0].sha256", [{"name": "a", "sha256": "xyz", "stage": None}]),
        ("inputs[0].stage", [{"name": "a", "sha256": SHA}]),
        ("model", "UNet2DModel"),
        ("pipeline", []),
        ("layers", {}),
        ("layers[0]", [{"kind": "conv2d"}]),
        ("fingerprint", SHA[1:]),
        ("seconds", True),
        ("seconds", -1),
        ("file", "x"),
        ("file.name", {"bytes": 1, "sha256": SHA}),
        ("file.bytes", {"name": "x", "bytes": -1, "sha256": SHA}),
        ("file.bytes", {"name": "x", "bytes": 1.0, "sha256": SHA}),
        ("file.sha256", {"name": "x", "bytes": 1, "sha256": SHA.replace("0", "G")}),
        ("files", {}),
        ("checksum", 1),
    ],
)
def test_malformed_values_are_named_by_key(key: str, value: object):
    with pytest.raises(ArtifactError, match=r"malformed") as caught:
        Manifest.from_json(edited(**{key.split("[")[0].split(".")[0]: value}), "x.json")
    assert caught.value.where == f"x.json, key {key}"


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", ""])
def test_a_listed_path_may_not_leave_the_directory(path: str):
    payload = json.loads(manifest(file=None, files={path: {"bytes": 1, "sha256": SHA}}).to_json())
    with pytest.raises(ArtifactError, match="leaves the directory"):
        Manifest.from_json(json.dumps(payload), "x.json")


def test_missing_and_unknown_keys():
    complete = json.loads(manifest().to_json())
    for key in complete:
        if key != "format":
            with pytest.raises(ArtifactError, match=f"missing.*x.json, key {key}"):
                Manifest.from_json(json.dumps({k: v for k, v in complete.items() if k != key}), "x.json")
    with pytest.raises(ArtifactError, match="unknown.*key colour"):
        Manifest.from_json(edited(colour="red"), "x.json")


def test_environment_names_versions_device_and_threads():
    found = environment("cuda:0", 4)
    assert {"python", "dqtool", "torch", "diffusers"} <= set(found.versions)
    assert (found.device, found.threads) == ("cuda:0", 4) and found.platform
    assert manifest().format == FORMAT
