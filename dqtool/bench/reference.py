"""The float network that an exported one is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dqtool.artifacts import open_artifact
from dqtool.bench.subject import Subject
from dqtool.errors import ArtifactError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["float_network"]


def float_network(subject: Subject) -> nn.Module:
    """Build the float32 network: of the reference model, else of the exported weights, dequantized.

    Speed does not depend on the values of weights.

    Raises:
        ArtifactError: the reference is another network, or the export holds no weights that can be dequantized.
    """
    from dqtool.models.networks.loading import build_network, load_weights
    from dqtool.models.sources.resolve import resolve_model

    if subject.reference is not None:
        source = resolve_model(subject.reference)
        if source.class_name != subject.class_name:
            raise ArtifactError(
                f"The reference is a {source.class_name}, the exported network a {subject.class_name}",
                where=subject.reference,
                fix="Give the model that was quantized as --reference, or leave it out",
            )
        network = build_network(source.class_name, source.config, load_weights(source), source.given)
        _same_shapes(network, subject)
    else:
        network = build_network(subject.class_name, subject.config, _exported_state(subject), subject.directory)
    return network


def _same_shapes(network: nn.Module, subject: Subject) -> None:
    """Raise `ArtifactError` if the tensors of the reference and the exported network differ in shape."""
    import torch

    from dqtool.models.families import family_of

    with torch.device("meta"):
        exported = family_of(subject.class_name, subject.directory).build(subject.config)
    wanted = {name: tuple(tensor.shape) for name, tensor in exported.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    other = next((name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)), None)
    if other is not None:
        raise ArtifactError(
            f"The reference is another network: its {other} is {found.get(other, 'missing')}, the exported network's "
            f"{wanted.get(other, 'missing')}",
            where=str(subject.reference),
            fix="Give the model that was quantized as --reference, or leave it out",
        )


def _exported_state(subject: Subject) -> dict[str, Any]:
    from dqtool.formats.dense import dense_state
    from dqtool.models.components.export_layout import weights_file

    artifact = open_artifact(subject.directory, ["export"])
    manifest, file = artifact.manifest, weights_file(artifact.manifest.pipeline)
    kind = manifest.parameters.format
    if kind == "dense":
        return artifact.tensors(file=file)
    if kind != "dq":
        raise ArtifactError(
            f"A directory of format '{kind}' holds no weights from which the float network can be built",
            where=subject.directory,
            fix="Give the float model as --reference, or bench a directory of format dq",
        )
    return dense_state(manifest, artifact.tensors(file=file))
