from __future__ import annotations

import re

import pytest
from timing import within

from dqtool.models.sources.patterns import Pattern, Patterns

TEXTS = ["", "a", "b.a", "aaaa", "foo", "x.foo", "xxy", "xxxxy", "zz9", "aaab", "up_blocks.1.attn.to_q", "é_1", "a\nb"]


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.*\.)?(a)",
        r"((a+)+b)",
        r"((a|aa)*)",
        r"x{2,3}?y?",
        r"[^a-c]+\d",
        r"(a*)*",
        r"^foo$",
        r"\bfoo\b",
        r"(.*\.)?(^foo)",
        r"up_blocks\.[0-3]\..*\.to_[qkv]",
        r"\w+|\W",
        r"[\s\S]*",
    ],
)
def test_as_pythons_engine(pattern: str):
    for text in TEXTS:
        assert Pattern(pattern).fullmatch(text) == (re.fullmatch(pattern, text) is not None), text


@pytest.mark.parametrize("pattern", [r"(a+)+b", r"(a|a)*b", r"(.*a){12}b", r"(a{0,1000}){0,1000}b", "((a*)*)*b"])
def test_what_would_take_years(pattern: str):
    def match() -> None:
        try:
            assert not Pattern(pattern).fullmatch("a" * 300)
        except ValueError as error:
            assert "too long" in str(error)

    within(1, match)


@pytest.mark.parametrize("pattern", [r"(a)\1", r"(?=a)", r"(?<!a)b", "(", "a" * 2000, "(?i:a)", "(" * 500 + ")" * 500])
def test_what_is_refused(pattern: str):
    with pytest.raises(ValueError, match="."):
        Pattern(pattern).fullmatch("aa")


def test_the_first_pattern_that_matches_wins():
    patterns = Patterns(["attn.to_q", "to_.", "^mid", "unet.*"])
    assert patterns.first("mid_block.attn.to_q") == "attn.to_q"
    assert patterns.first("down.to_k") == "to_."
    assert patterns.first("unet.x") == "unet.*"
    assert patterns.first("other") is None
