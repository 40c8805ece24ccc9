"""Groups of layers that share one quantized input and therefore one scaling."""

from __future__ import annotations

from collections.abc import Iterable

from dqtool.graph.trace import LayerInfo

__all__ = ["Groups", "scaling_groups"]

Groups = dict[str, list[LayerInfo]]
"""The layers of each group (q, k, v of an attention, say), by the name of the group's owner, its first layer."""


def scaling_groups(layers: Iterable[LayerInfo]) -> Groups:
    """Return the groups in execution order; attention products belong to none."""
    groups: Groups = {}
    for info in layers:
        if info.kind != "attention":
            groups.setdefault(info.shares or info.name, []).append(info)
    return groups
