"""Builder of the `quantization_config` of exported networks, by which diffusers finds dqtool's quantizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dqtool.artifacts.jsonvalues import Json, JsonObject
from dqtool.models.sampling.fitted import FITTED

__all__ = ["FORMAT", "METHOD", "quantization_config"]

METHOD = "dqtool"
FORMAT = "dqtool/1"


def quantization_config(
    records: Sequence[JsonObject],
    timesteps: int,
    prediction: Mapping[str, Sequence[int]] | None = None,
    static: bool = True,
    corrected_for: JsonObject | None = None,
) -> dict[str, Json]:
    """Return the `quantization_config` of an exported `config.json`.

    It holds the layers with their bits, in execution order, and the row shape of each prediction-correction table, by
    name, where there are some. `corrected_for` is the sampling that these were fitted with
    (`models.sampling.fitted`). `static` says whether the only row of one-row tables serves all timesteps.
    """
    known: dict[str, Json] = {
        "quant_method": METHOD,
        "format": FORMAT,
        "timesteps": timesteps,
        "layers": list(records),
    }
    if timesteps == 1:
        known["static"] = static
    if prediction is not None:
        known["prediction"] = {k: list(row) for k, row in prediction.items()}
        known |= {FITTED: dict(corrected_for)} if corrected_for else {}
    return known
