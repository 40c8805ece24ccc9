"""Options of `dqtool report`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

from dqtool.errors import UsageError
from dqtool.stages.options.declared import INPUT, Option

__all__ = ["FORMATS", "ReportOptions"]

FORMATS = {"html": ".html", "md": ".md"}
"""Formats of a page, with their suffixes."""


@dataclass(frozen=True)
class ReportOptions:
    """Options of `dqtool report`.

    Without `places` the command reads a line from a pipe, else `eval.json`. `format` None follows from the suffix of `output`.
    """

    places: Annotated[
        tuple[str, ...],
        Option("Directories with eval results, or their JSON files. Default: eval.json.", "DIR", positional=True),
    ] = ()
    output: Annotated[
        str | None,
        Option("Page to write. Default: report.html, or report.md.", "FILE", short="-o", panel=INPUT),
    ] = None
    format: Annotated[
        str | None,
        Option(
            "Format of the page. Give md to read it in a repository. Default: that of the file's name, else html.",
            "html|md",
            panel=INPUT,
        ),
    ] = None

    def __post_init__(self) -> None:
        """Raise `UsageError` for a format that does not exist, or a name that means something else."""
        if self.format is not None and self.format not in FORMATS:
            raise UsageError(
                f"unknown format '{self.format}'", where="--format", fix=f"Choose from {', '.join(FORMATS)}"
            )
        suffix = os.path.splitext(self.output or "")[1].lower()
        if suffix in (".json", ".safetensors", ".png"):
            raise UsageError("A page can not have this name", where=f"-o {self.output}", fix="End it in .html or .md")
        named = next((name for name, ending in FORMATS.items() if ending == suffix), None)
        if self.format is not None and named not in (None, self.format):
            raise UsageError(
                f"A page of format {self.format} can not end in {suffix}", where="-o", fix="Drop one of them"
            )

    @property
    def kind(self) -> str:
        """The format: as asked, else by the output's name, else HTML."""
        by_name = "md" if (self.output or "").lower().endswith(".md") else "html"
        return self.format or by_name

    @property
    def path(self) -> str:
        """Path of the page."""
        return self.output or "report" + FORMATS[self.kind]
