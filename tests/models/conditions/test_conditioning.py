"""Tables of conditions: which of them a number of images takes."""

from __future__ import annotations

import torch

from dqtool.models.conditions.conditioning import Conditions, Request, class_labels


def test_fewer_images_than_conditions_take_them_evenly_and_keep_the_null_one() -> None:
    conditions = class_labels(Request(52), 1000, 1.5)
    half = conditions.evenly(26)
    labels = half.table["class_labels"]
    assert len(half) == 27
    assert labels[-1] == 1000
    assert labels[:-1].diff().unique().tolist() == [38, 39]
    assert half.guidance == 1.5
    assert half.names == [f"class {label}" for label in labels[:-1].tolist()]
    assert half.digits is not None
    assert torch.equal(half.digits, labels)
    assert half.given(0, 26)["class_labels"].max() > 950


def test_as_many_images_as_conditions_take_them_all() -> None:
    conditions = class_labels(Request(64), 10, 1.5)
    assert conditions.evenly(10) is conditions
    assert conditions.evenly(128) is conditions
    nothing = Conditions({})
    assert nothing.evenly(1) is nothing
