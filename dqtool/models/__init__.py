"""Diffusion models: where they come from, how they are built, how they sample.

| package | serves |
| --- | --- |
| `sources` | finding and reading full-precision models |
| `families` | what dqtool must know of each network class |
| `networks` | building float and quantized networks |
| `sampling` | schedules, schedulers, the sampling loop |
| `conditions` | labels, prompts and tensors that condition a network |
| `components` | the float components of a pipeline |
| `hub` | loading exported directories through diffusers |

`latent_class` stays at this level: the `model_index.json` of exported pipelines names it.
"""
