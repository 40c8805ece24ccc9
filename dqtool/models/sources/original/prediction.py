"""Prediction type and final noise level of Stable Diffusion networks, read from marker keys or the authors' YAML."""

from __future__ import annotations

from dataclasses import dataclass

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError
from dqtool.models.sources.original.layout import Shapes
from dqtool.models.sources.original.openai_unet import model_parameters

__all__ = ["Prediction", "found_prediction", "with_prediction"]

_PARAMETERIZATIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
"""Prediction types by `model.params.parameterization` of CompVis' YAML configs."""

_SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}
"""Prediction types by the denoiser's scaling in Stability's YAML configs."""

_EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
_EDM_V = {
    "_class_name": "EDMEulerScheduler",
    "sigma_min": 0.002,
    "sigma_max": 120.0,
    "sigma_data": 1.0,
    "sigma_schedule": "exponential",
    "prediction_type": "v_prediction",
}


@dataclass(frozen=True)
class Prediction:
    """Prediction type (None: neither file nor YAML names it), and whether the schedule ends at zero signal-to-noise ratio."""

    kind: str | None = None
    zero_snr: bool = False
    edm: ForeignConfig | None = None


def found_prediction(shapes: Shapes, published: ForeignConfig | None) -> Prediction:
    """Return the prediction from marker keys (`v_pred`, `ztsnr`, `edm_mean`, `edm_vpred.sigma_max`) or the YAML.

    Raises:
        ArtifactError: the YAML names a parameterization that diffusers lacks.
    """
    if "edm_vpred.sigma_max" in shapes:
        return Prediction("v_prediction", edm=_EDM_V)
    if "edm_mean" in shapes:
        return Prediction("epsilon", edm=_EDM)
    model = model_parameters(published)
    zero = "ztsnr" in shapes or bool(model.get("zero_terminal_snr") or model.get("rescale_betas_zero_snr"))
    if "v_pred" in shapes:
        return Prediction("v_prediction", zero)
    if "parameterization" in model:
        name = model["parameterization"]
        if name not in _PARAMETERIZATIONS:
            raise ArtifactError(
                f"The YAML config names the parameterization '{name}', which diffusers does not know",
                where="YAML config, key model.params.parameterization",
                fix="Say what the network predicts with --prediction-type",
            )
        return Prediction(_PARAMETERIZATIONS[name], zero)
    denoiser = ((model.get("denoiser_config") or {}).get("params") or {}).get("scaling_config") or {}
    scaling = str(denoiser.get("target", "")).rpartition(".")[2]
    return Prediction(_SCALINGS.get(scaling, "v_prediction" if zero else None), zero)


def with_prediction(schedule: ForeignConfig, found: Prediction) -> ForeignConfig:
    """Return the scheduler config with the prediction type in it.

    A schedule of zero terminal signal-to-noise ratio is rescaled and sampled from its last step (arXiv 2305.08891).
    """
    if found.edm is not None:
        return dict(found.edm)
    config = dict(schedule)
    if found.kind is not None:
        config["prediction_type"] = found.kind
    if found.zero_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config
