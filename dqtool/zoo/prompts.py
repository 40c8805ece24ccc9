"""Prompts of ``zoo:digits-sd``, and a CLIP tokenizer for their words."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["TEMPLATES", "WORDS", "prompt", "prompts", "write_tokenizer"]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a handwritten {}", "the digit {}", "a scan of the number {}", "{}", "a {} written by hand")
"""Training prompts of the text model, with the digit as a word or as a numeral."""

LENGTH = 16
"""Tokens of a prompt, including the two markers and the padding."""


def prompt(digit: int) -> str:
    """Return the plainest prompt of a digit: "a handwritten seven"."""
    return TEMPLATES[0].format(WORDS[digit])


def prompts(digit: int) -> list[str]:
    """Return all prompts of a digit in a fixed order."""
    return [template.format(name) for template in TEMPLATES for name in (WORDS[digit], str(digit))]


def write_tokenizer(directory: Path) -> int:
    """Write a `CLIPTokenizer` whose merges build every word of `prompts`; other words are split into letters.

    Returns the size of the vocabulary.
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    words = sorted({word for digit in range(10) for text in prompts(digit) for word in text.split()})
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            pieces[:2] = ["".join(pair)]
    for pair in merges:
        piece = "".join(pair)
        if piece not in vocabulary:
            vocabulary.append(piece)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(directory / "vocab.json"), merges=str(directory / "merges.txt"), model_max_length=LENGTH
    )
    tokenizer.save_pretrained(directory)
    return len(vocabulary)
