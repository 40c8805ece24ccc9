"""Help of a command: its options in panels, with the names that registries hold.

Plain text, not rich: `dqtool --help` answers at once because it imports nothing heavy.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from typer.core import TyperCommand

from dqtool.stages.options.declared import GENERAL, INPUT, QUALITY, RESOURCES

__all__ = ["PanelCommand", "with_names"]

ARGUMENTS = "Arguments"
PANELS = (ARGUMENTS, INPUT, QUALITY, RESOURCES, GENERAL)
"""Panels in the order they are shown."""
_REGISTRY = re.compile(r"\{([\w.]+):(\w+)\}")


class PanelCommand(TyperCommand):
    """A command whose help shows its options panel by panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the panels that have options."""
        panels: dict[str, list[tuple[str, str]]] = {panel: [] for panel in PANELS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                panel = ARGUMENTS if is_argument else getattr(parameter, "rich_help_panel", None) or GENERAL
                panels[panel].append((record[0], with_names(record[1])))
        for panel, records in panels.items():
            if records:
                with formatter.section(panel):
                    formatter.write_dl(records)


def with_names(text: str) -> str:
    """Replace each `{MODULE:NAME}` by the names that this dictionary or tuple holds, separated by commas."""

    def names(found: re.Match[str]) -> str:
        return ", ".join(getattr(import_module(found[1]), found[2]))

    return _REGISTRY.sub(names, text)
