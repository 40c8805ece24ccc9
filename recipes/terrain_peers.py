"""Other quantizers on the terrain model, as networks that take the place of ours: onnxruntime, NNCF, SDNQ.

The first two quantize the ONNX graph that the package ships, which a user of it would start from. Each is installed by hand:
`pip install onnxruntime nncf openvino sdnq`. They support one step only, at the highest noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from terrain_model import SCHEDULER, find_graph
from torch import Tensor, nn

__all__ = ["PEERS", "Peer", "float_network"]

SIGMA, DATA = SCHEDULER["sigma_max"], SCHEDULER["sigma_data"]
INPUT_SCALE = (SIGMA**2 + DATA**2) ** 0.5
CALIBRATION = 32
"""Samples that the static peers calibrate on, one at a time."""
LAST_LABEL = 99


@dataclass(frozen=True)
class Peer:
    """A network as the sampler calls it, what it is with its version, and the size of its file in bytes."""

    network: nn.Module
    what: str
    bytes: int


class Denoiser(nn.Module):
    """The package's graph as a network of diffusers: its preconditioning is undone, and the scheduler does it again."""

    def __init__(self, run: Callable[[dict[str, np.ndarray]], np.ndarray]) -> None:
        super().__init__()
        self.run = run

    def forward(self, sample: Tensor, *_positional: Any, class_labels: Tensor, **_: Any) -> tuple[Tensor]:
        """Return the network's prediction for scaled noise `[N, 1, 128, 128]`."""
        noisy = sample * INPUT_SCALE
        denoised = torch.cat(
            [
                torch.from_numpy(self.run(inputs_of(x[None], label[None])))
                for x, label in zip(noisy, class_labels, strict=True)
            ]
        )
        past = SIGMA - SCHEDULER["sigma_min"]
        kept = DATA**2 / (past**2 + DATA**2)
        return ((denoised - kept * noisy) / (past * DATA / INPUT_SCALE),)


def inputs_of(noisy: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """Return the graph's inputs for one map."""
    return {
        "noisy": noisy.numpy().astype(np.float32),
        "sigma": np.full(1, SIGMA, np.float32),
        "difficulty": (labels.numpy() / LAST_LABEL).astype(np.float32),
    }


def calibration_inputs(calibrated: Path) -> Iterator[dict[str, np.ndarray]]:
    """Yield the graph's inputs for the first samples that our own calibration has seen."""
    from dqtool.artifacts import open_artifact
    from dqtool.training.data import Trajectory

    points = Trajectory.from_tensors(open_artifact(str(calibrated), ["calibrate"]).tensors())
    for index in range(CALIBRATION):
        x, _, conditions = points.arguments(slice(index, index + 1))
        yield inputs_of(x * INPUT_SCALE, conditions["class_labels"])


def session_of(path: Path) -> Denoiser:
    """Return an onnxruntime session of one thread as a network."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Denoiser(lambda given: session.run(None, given)[0])


def float_network() -> Denoiser:
    """Return the package's own network, not quantized."""
    return session_of(find_graph())


def onnxruntime_static(work: Path, calibrated: Path) -> Peer:
    """Return onnxruntime's static int8: weights and inputs of convolutions, per channel, ranges by minimum and maximum."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.inputs = calibration_inputs(calibrated)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.inputs, None)

    path = work / "onnxruntime-static.onnx"
    quantize_static(
        find_graph(),
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )
    what = f"onnxruntime {version('onnxruntime')} quantize_static, convolutions 8/8, {CALIBRATION} samples"
    return Peer(session_of(path), what, path.stat().st_size)


def onnxruntime_dynamic(work: Path, _calibrated: Path) -> Peer:
    """Return onnxruntime's dynamic int8: ranges of inputs are measured while it runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = work / "onnxruntime-dynamic.onnx"
    quantize_dynamic(find_graph(), path, weight_type=QuantType.QUInt8)
    what = f"onnxruntime {version('onnxruntime')} quantize_dynamic, 8/8"
    return Peer(session_of(path), what, path.stat().st_size)


def nncf_static(work: Path, calibrated: Path) -> Peer:
    """Return NNCF's post-training int8 of the OpenVINO model, for transformers: asymmetric inputs and SmoothQuant.

    That is the best of its settings here: on eight maps the default gives 9.0 dB, the mixed preset 13.0, this one 17.0.
    """
    import nncf
    import openvino

    core = openvino.Core()
    data = nncf.Dataset(list(calibration_inputs(calibrated)))
    model = nncf.quantize(
        core.read_model(str(find_graph())), data, subset_size=CALIBRATION, model_type=nncf.ModelType.TRANSFORMER
    )
    path = work / "nncf.xml"
    openvino.save_model(model, str(path), compress_to_fp16=False)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    what = f"NNCF {version('nncf')} quantize on OpenVINO {version('openvino')}, 8/8, model_type TRANSFORMER, {CALIBRATION} samples"
    return Peer(Denoiser(lambda given: compiled(given)[0]), what, size)


def sdnq(bits: int) -> Callable[[Path, Path], Peer]:
    """Return SDNQ's quantizer of weights alone, linear layers and convolutions."""

    def make(work: Path, _calibrated: Path) -> Peer:
        from diffusers import UNet2DModel
        from sdnq import sdnq_post_load_quant

        network = UNet2DModel.from_pretrained(work / "model" / "unet").eval()
        network = sdnq_post_load_quant(network, weights_dtype=f"int{bits}", quant_conv=True)
        size = sum(each.numel() * each.element_size() for each in (*network.parameters(), *network.buffers()))
        return Peer(network, f"SDNQ {version('sdnq')} int{bits}, weights alone, with convolutions", size)

    return make


PEERS: dict[str, Callable[[Path, Path], Peer]] = {
    "onnxruntime static": onnxruntime_static,
    "onnxruntime dynamic": onnxruntime_dynamic,
    "NNCF": nncf_static,
    "SDNQ 8": sdnq(8),
    "SDNQ 4": sdnq(4),
}
"""Peers by the name of their row: each takes the work directory and our calibrated artifact."""
