"""Fail on docstrings and comments that open with a word which hides their subject.

    python tests/check_prose.py [FILE_OR_FOLDER...]

A summary starts with a verb in the imperative or with a noun that names the thing. `make lint` runs this.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("dqtool", "tests", "recipes")
OPENINGS = frozenset(
    [
        "of",
        "what",
        "whether",
        "as",
        "those",
        "that",
        "who",
        "whose",
        "where",
        "how",
        "why",
        "which",
        "when",
        "while",
        "because",
        "so",
        "since",
        "for",
        "from",
        "with",
        "by",
        "it",
        "they",
        "these",
    ]
)
"""First words, in lower case, that a docstring must not have."""
COMMENT_OPENINGS = frozenset(["of", "what", "whether", "those", "that", "as", "who", "whose", "how", "which"])


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring, those below assignments included."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if (
                isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
            ):
                yield statement.lineno, statement.value.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every comment that starts one: not the further lines of a longer one."""
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            own_line = token.line.strip().startswith("#")
            if not (own_line and token.start[0] == last + 1):
                yield token.start[0], token.string.lstrip("#! ")
            last = token.start[0] if own_line else last


def first_word(text: str) -> str:
    """Return the first word in lower case, or nothing where the text starts with code."""
    found = re.match(r"\s*([A-Za-z']+)", text)
    return found[1].lower() if found else ""


def faults(path: Path) -> Iterator[str]:
    """Yield a line for each docstring or comment of a file that opens badly."""
    source = path.read_text(encoding="utf-8")
    for kind, openings, found in (
        ("docstring", OPENINGS, docstrings(ast.parse(source))),
        ("comment", COMMENT_OPENINGS, comments(source)),
    ):
        for line, text in found:
            if first_word(text) in openings:
                yield f"{path.relative_to(ROOT)}:{line}: {kind} opens with '{text.split()[0]}': {text.strip()[:70]!r}"


def main() -> int:
    """Print every fault; return 1 where there is one."""
    given = [Path(name).resolve() for name in sys.argv[1:]] or [ROOT / folder for folder in FOLDERS]
    files = sorted(file for path in given for file in ([path] if path.is_file() else path.rglob("*.py")))
    found = [fault for file in files for fault in faults(file)]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
