"""Conditions of images: class labels, prompts, precomputed tensors or none, and the strength of guidance.

Conditions are tensors. Only a few differ (ten labels, a list of prompts), so a table holds each once, and images and
trajectory points refer to its rows. With classifier-free guidance the last row is the null condition.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dqtool import report
from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.core.device import to_cpu
from dqtool.errors import UsageError
from dqtool.models.conditions.prompts import PROMPTS

if TYPE_CHECKING:
    from dqtool.models.components.companions import Companions
    from dqtool.models.conditions.images import EncodedImages

__all__ = [
    "CONTEXT_TOKENS",
    "IMAGE_CONDITION",
    "SAMPLE_SIZE",
    "WAYS",
    "Conditions",
    "Request",
    "class_contexts",
    "class_labels",
    "missing_conditions",
    "random_conditions",
    "text_conditions",
    "with_embedded",
]

CONTEXT_TOKENS, SAMPLE_SIZE = "_context_tokens", "_sample_size"
"""Config keys for sizes that a network's class leaves open: tokens of its context, side of its latents. diffusers keeps and
ignores keys that start with an underscore."""

IMAGE_CONDITION = "beside_latents"
"""Name of the condition `[K, C, H, W]` that is concatenated to the noisy latents: mask and masked image for inpainting, the
image for editing. It is the same with and without guidance."""

MOST_RANDOM = 64
"""Largest number of rows of a table of random conditions."""

TOGETHER = 16
"""Number of prompts encoded at a time."""

WAYS = (
    "Give --pipeline DIR (a pipeline whose text encoders and tokenizers are used), --conditions FILE (.safetensors or .npz "
    "with these tensors), or --random-conditions (drawn at random, which costs quality)"
)
"""Advice for a model whose own components can't make its conditions."""


@dataclass(frozen=True)
class Request:
    """Conditions that the user requests, for `count` images.

    Guidance and prompts default to those of `card` (the pipeline's `sampling.json`), then to the family's. `random` allows
    random conditions where the model can't make its own. `images` stand beside the latents of networks that take some.
    """

    count: int
    seed: int = 0
    guidance: float | None = None
    prompts: Sequence[str] | None = None
    card: ForeignConfig = field(default_factory=dict)
    random: bool = False
    images: EncodedImages | None = None

    def weight(self, default: float) -> float:
        """Return the weight of guidance; 1 and less mean none, as in diffusers' pipelines."""
        chosen = self.guidance if self.guidance is not None else self.card.get("guidance", default)
        return max(float(chosen), 1.0)


@dataclass
class Conditions:
    """Table of conditions: `table` holds a tensor `[K, ...]` by name; with `guidance` above 1 the last row is the null condition.

    `names` are labels of the rows; `digits` `[K]` is the digit that each row should give, where that is known. `embedded`
    is the guidance that a distilled network takes as an input; `guidance` is then 1, as in the pipelines of such networks.
    `random` says that the table was drawn at random.
    """

    table: dict[str, Tensor]
    guidance: float = 1.0
    names: list[str] = field(default_factory=list)
    digits: Tensor | None = None
    embedded: float | None = None
    random: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.table.values()))) if self.table else 0

    @property
    def guided(self) -> bool:
        """Return whether every step runs the network with and without the condition (classifier-free guidance)."""
        return self.guidance > 1

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the table's rows for images `start` to `stop`, cycling through all conditions."""
        return torch.arange(start, stop) % max(1, len(self) - self.guided)

    def given(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return the conditions of images `start` to `stop`, `[stop - start, ...]` each."""
        rows = self.rows(start, stop)
        return {name: values[rows] for name, values in self.table.items()}

    def repeated(self, count: int) -> Conditions:
        """Return at least `count` conditions, the same in turn, so that more images can stand beside them."""
        kinds = len(self) - self.guided
        if count <= kinds:
            return self
        rows = torch.cat([torch.arange(count) % kinds, torch.arange(kinds, len(self))])
        return replace(
            self,
            table={name: values[rows] for name, values in self.table.items()},
            names=[self.names[row % kinds] for row in range(count)] if self.names else [],
            digits=None if self.digits is None else self.digits[rows],
        )

    def evenly(self, images: int) -> Conditions:
        """Return the conditions for this number of images, chosen evenly over the list where there are more conditions."""
        kinds = len(self) - self.guided
        if not self.table or images >= kinds:
            return self
        rows = _spread(kinds, images)
        names = [self.names[row] for row in rows.tolist()] if self.names else []
        rows = torch.cat([rows, torch.arange(kinds, len(self))])
        table = {name: values[rows] for name, values in self.table.items()}
        return Conditions(
            table, self.guidance, names, None if self.digits is None else self.digits[rows], self.embedded
        )

    @property
    def null(self) -> dict[str, Tensor] | None:
        """Return the null condition, `[1, ...]` each; None without guidance."""
        return {name: values[-1:] for name, values in self.table.items()} if self.guided else None

    def digest(self) -> str:
        """Return a hex digest of the tables."""
        found = hashlib.sha256()
        for name in sorted(self.table):
            found.update(name.encode() + self.table[name].contiguous().numpy().tobytes())
        return found.hexdigest()

    def requested_digits(self, images: int) -> Tensor | None:
        """Return the digit that each image should show, `[images]`; None where that is unknown."""
        return None if self.digits is None else self.digits[self.rows(0, images)]


def random_conditions(
    draw: Callable[[ForeignConfig, int, torch.Generator], dict[str, Tensor]],
    config: ForeignConfig,
    request: Request,
) -> Conditions:
    """Return a table of random conditions, or an empty one for networks that need none.

    Raises:
        UsageError: the request has prompts or guidance, or the network needs conditions and random ones are not allowed.
    """
    if request.prompts is not None:
        raise UsageError(
            "Prompts need the pipeline's text encoder",
            where="--prompts",
            fix="Start from a pipeline directory with text_encoder and tokenizer, or name one with --pipeline DIR",
        )
    generator = torch.Generator().manual_seed(request.seed)
    table = draw(config, min(request.count, MOST_RANDOM), generator)
    if table and not request.random:
        raise missing_conditions("This model comes without the encoder that makes its conditions", table)
    if request.guidance is not None and request.guidance > 1:
        raise UsageError(
            "Guidance needs a condition and its absence, and this model comes with neither",
            where="--guidance",
            fix="Start from a conditional pipeline, or leave it out",
        )
    if table:
        report.warn("conditions are drawn at random: quality with real ones may be lower than what is measured")
    return Conditions(table, random=bool(table))


def missing_conditions(what: str, table: Mapping[str, Tensor], where: str = "conditions") -> UsageError:
    """Return the error that names the three ways to give a model its conditions; `table` shows their shapes."""
    shapes = ", ".join(f"{name} {['K', *each.shape[1:]]}".replace("'", "") for name, each in sorted(table.items()))
    return UsageError(what, where=f"{where}: {shapes}", fix=WAYS)


def class_labels(request: Request, classes: int, default: float) -> Conditions:
    """Return the labels themselves as the condition `class_labels`; the label `classes` means no class.

    Raises:
        UsageError: the request has prompts.
    """
    _refuse_prompts(request)
    labels = _spread(classes, request.count)
    guidance = request.weight(default)
    rows = torch.cat([labels, torch.tensor([classes])]) if guidance > 1 else labels
    return Conditions({"class_labels": rows}, guidance, [f"class {i}" for i in labels.tolist()], rows)


def class_contexts(request: Request, companions: Companions, default: float) -> Conditions:
    """Return the embedding of each class as the context `encoder_hidden_states` `[K, 1, D]`.

    Raises:
        UsageError: the request has prompts.
    """
    _refuse_prompts(request)
    embedder = companions.load("class_embedder")
    labels = _spread(embedder.config.classes, request.count)
    guidance = request.weight(default)
    rows = torch.cat([labels, torch.tensor([embedder.config.classes])]) if guidance > 1 else labels
    with torch.no_grad():
        context = embedder(rows).float()
    return Conditions({"encoder_hidden_states": context}, guidance, [f"class {i}" for i in labels.tolist()], rows)


def text_conditions(
    request: Request,
    companions: Companions,
    default: float,
    encode: Callable[[Any, list[str]], tuple[dict[str, Tensor], dict[str, Tensor]]],
    embed: Callable[[float, int], dict[str, Tensor]] | None = None,
) -> Conditions:
    """Return the conditions of prompts; `encode(pipeline, prompts)` returns theirs and the null condition.

    The prompts are the requested ones, else the card's, else a small built-in list. With `embed` the network takes
    guidance as an input (`with_embedded`), and there is no null condition.

    Raises:
        UsageError: text encoders that the pipeline needs are missing.
    """
    missing = companions.missing_encoders()
    digits: Tensor | None = None
    card = request.card.get("prompts")
    if request.prompts is not None:
        prompts = list(request.prompts)
    elif card:
        prompts = [text if isinstance(text, str) else text[0] for text in card]
        if not any(isinstance(text, str) for text in card):
            digits = torch.tensor([text[1] for text in card])
    else:
        report.warn(f"{len(PROMPTS)} built-in prompts are used; name a file of your own with --prompts")
        prompts = list(PROMPTS)
    chosen = _spread(len(prompts), request.count)
    prompts = [prompts[i] for i in chosen.tolist()]
    guidance = request.weight(default)
    parts: list[dict[str, Tensor]] = []
    null: dict[str, Tensor] = {}
    with companions.text_pipeline() as pipeline, torch.no_grad():
        for start in range(0, len(prompts), TOGETHER):
            try:
                given, null = encode(pipeline, prompts[start : start + TOGETHER])
            except (AttributeError, TypeError, ValueError) as e:
                if not missing:
                    raise
                raise UsageError(
                    f"The pipeline can't encode prompts without its {' and '.join(missing)}",
                    where=str(companions.index.get("_class_name")),
                    fix=WAYS,
                ) from e
            parts.append(to_cpu(given))
    guided = guidance > 1 and embed is None and bool(null)
    if guided:
        parts.append(to_cpu(null))
    table = {name: torch.cat([part[name] for part in parts]).float().contiguous() for name in parts[0]}
    if digits is not None:
        digits = torch.cat([digits[chosen], torch.tensor([-1] * guided, dtype=digits.dtype)])
    if embed is not None:
        return with_embedded(Conditions(table, 1.0, prompts, digits), guidance, embed)
    return Conditions(table, guidance if guided else 1.0, prompts, digits)


def with_embedded(
    conditions: Conditions, guidance: float, embed: Callable[[float, int], dict[str, Tensor]]
) -> Conditions:
    """Return `conditions` with the guidance input of a guidance-distilled network, made by `embed(guidance, rows)`."""
    table = conditions.table | embed(guidance, len(conditions))
    return replace(conditions, table=table, guidance=1.0, embedded=guidance)


def _spread(there: int, wanted: int) -> Tensor:
    """Return the indices of all `there` items, or of `wanted` of them, evenly over the list."""
    return torch.arange(there) if wanted >= there else torch.arange(wanted) * there // wanted


def _refuse_prompts(request: Request) -> None:
    if request.prompts is not None:
        raise UsageError("This model is conditioned on classes, not on text", where="--prompts", fix="Leave it out")
