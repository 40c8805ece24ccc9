"""Weight Dilation and the scaling methods that it is compared with.

**What it is.** A layer that multiplies `W` by `x` gives the same output if each in-channel of `W` is multiplied by a factor
`s` and the same channel of `x` is divided by it: `(W · s)(x / s) = W x` (Eq. 5 of arXiv 2409.14307). Quantization errors
do change, so `s` is chosen to make them small. Weight Dilation takes the largest `s ≥ 1` that leaves every out-channel's
range alone (Eq. 17-21): activations become narrower and weights no wider. Rivals balance the two ranges (SmoothQuant),
search (OS+) or learn (OmniQuant).

**What an artifact holds.** `X.weight` is `s · W` and `X.dilation` is `s` `[C_in]`. The input's quantizer divides by `s`: its
multiplier becomes `1 / (s · Δ)`, which costs nothing. The manifest records the method of each layer. Layers that read one
quantized input (q, k, v) share their factors.

**Who calls what.**

    stage      calls                                 file
    dilate     dilate_network    weights alone       dilating.py: choose, multiply, fold on request (`--fold`)
    calibrate  rescale_network   sees activations    rescaling.py: keep or replace factors (`--scaling auto|keep|...`)
    distill    learn_scaling     starts learning     learning.py: factors as parameters, for auto and omniquant
               merge_learned     ends it
               fold_packed       after training      folding.py: move factors into norms, biases, projections

Each stage that changes factors proves that the network's output stayed: `verifying.check_equivalence`.

**Files.** From the bottom up:

    methods/        one file a method, their interface (base.py) and the error that searching ones minimise (output_error.py)
    groups.py       layers that share one input
    records.py      manifest entries and tables on the terminal
    choosing.py     run a method for every group, by weights or by activations
    propagation.py  move a division backwards through the network to parameters
    folding.py      apply what propagation finds
    verifying.py    compare outputs before and after
    dilating.py, rescaling.py, learning.py   what stages call

The numerics of Weight Dilation itself are `dqtool/core/dilation.py`.

**To add a method** write `methods/NAME.py` with a function from `ScalingInput` to `ScalingResult` and
`METHOD = ScalingMethod("NAME", function, ...)`, and add the module to the list in `methods/__init__.py`. A method with
`needs_statistics` appears in `calibrate --scaling`, any other in `dilate --scaling`.
"""
