from __future__ import annotations

import pytest

from dqtool.errors import ArtifactError, DqtoolError, EnvironmentFault, NumericError, UsageError


def test_exit_codes_of_the_contract():
    codes = {UsageError: 2, ArtifactError: 3, EnvironmentFault: 4, NumericError: 5, DqtoolError: 1}
    assert all(kind("x").exit_code == code and isinstance(kind("x"), DqtoolError) for kind, code in codes.items())


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DqtoolError("It broke"), "It broke."),
        (DqtoolError("It broke.", where="a.json, key b", fix="Mend it"), "It broke. Where: a.json, key b. Mend it."),
        (DqtoolError("Line one\n\n   line two", where="my  file"), "Line one line two. Where: my  file."),
        (DqtoolError("Unknown", fix="Did you mean x?"), "Unknown. Did you mean x?"),
    ],
)
def test_is_one_paragraph(error: DqtoolError, text: str):
    assert str(error) == text


def test_messages_are_short_and_without_control_characters():
    error = DqtoolError("a\x1b[2Jb\u202ec" + "x" * 30_000, where="dir/\x07name", fix="Mend " + "y" * 2000)
    text = str(error)
    assert len(text) <= 500
    assert text.isprintable()
    assert "\\x1b" in text
    assert r"Where: dir/\x07name." in text
    assert text.endswith("yyy.")


def test_short_messages_stay_as_they_are():
    assert str(DqtoolError("Größe 八", where="a b  c")) == "Größe 八. Where: a b  c."
