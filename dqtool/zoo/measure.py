"""Quality of an embedded model next to its lower bound: `python -m dqtool.zoo.measure NAME`.

The lower bound is `fd.digits` or `fd.garments` of real images outside the training set. A Fréchet distance depends on the number of
samples, so the model is measured at that number and at `--samples`. The figures are stored in the model's card.
"""

from __future__ import annotations

import argparse
import json

from dqtool.core.allocator import keep_freed_memory
from dqtool.metrics.digits import DIGITS
from dqtool.metrics.garments import GARMENTS
from dqtool.models.networks.loading import build_network, load_weights
from dqtool.models.sources.resolve import ZOO, resolve_model
from dqtool.stages.eval import EvalOptions, reference_images
from dqtool.stages.evaluation.images import maker_of_source
from dqtool.zoo.data import digits, fashion

KEYS = ("samples", "fd.digits", "fd.garments", "is.digits", "is.garments", "confident_share")


def main() -> None:
    """Sample, measure, print, and update the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="digits-ddpm")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    keep_freed_memory()
    source = resolve_model(f"zoo:{args.name}")
    network = build_network(source.class_name, source.config, load_weights(source), source.given)
    maker = maker_of_source(source, args.samples, 0, args.steps)
    images = reference_images(network, source, maker, EvalOptions(samples=args.samples))
    classifier, data = (GARMENTS, fashion) if args.name == "fashion" else (DIGITS, digits)
    held_out = data()["held_out"][0][: args.samples]
    sets = {"real, held out": held_out, "model, as many": images[: len(held_out)], "model": images}
    figures = {}
    for name, each in sets.items():
        found = classifier.evaluate(each)
        figures[name] = {key: found[key] for key in KEYS if key in found}
    print(json.dumps(figures, indent=1))
    card = ZOO / args.name / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
