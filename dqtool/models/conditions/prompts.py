"""Default calibration prompts of text-to-image models: everyday subjects in several styles. Imports no torch."""

from __future__ import annotations

__all__ = ["PROMPTS"]

PROMPTS = (
    "a photo of a red bicycle leaning against a brick wall",
    "a bowl of ramen with an egg, top view",
    "a portrait of an old fisherman, oil painting",
    "a snowy mountain village at dusk",
    "a golden retriever running on a beach",
    "a glass of orange juice on a wooden table",
    "a watercolor of a lighthouse in a storm",
    "a modern kitchen with marble counters",
    "an astronaut riding a horse on the moon",
    "a crowded street market in Marrakesh",
    "a close-up of a dragonfly on a leaf",
    "a vintage steam train crossing a bridge",
    "a cat sleeping on a stack of books",
    "a futuristic city skyline at night, neon lights",
    "a field of sunflowers under a blue sky",
    "a black and white photo of a jazz band",
    "a cup of coffee with latte art",
    "a child flying a kite in a park",
    "an isometric illustration of a small office",
    "a plate of sushi on black slate",
    "a medieval castle on a hill, digital art",
    "a hummingbird drinking from a flower",
    "a surfer riding a large wave",
    "a pencil sketch of a human hand",
    "a desert road leading to the horizon",
    "a robot gardener watering plants",
    "two elephants at a water hole at sunset",
    "a stained glass window of a tree",
    "a basketball player dunking, action shot",
    "a cozy cabin interior with a fireplace",
    "a school of colorful fish over a coral reef",
    "an antique map of an imaginary island",
)
