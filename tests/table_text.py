"""A tiny table for the tests of tables."""

TINY_TABLE = """
title: A tiny table
source: Table 0
model: {model}
schedule: full
seeds: [0, 1]
baseline: none
columns: [psnr, unsaturated, size_ratio]
paper-columns: FID
options:
  calibrate: {{steps: 2, samples: 4}}
  distill: {{iters: 0}}
  eval: {{samples: 2, metrics: [similarity, cost]}}
groups:
  - name: 4/4
    seeds: [0]
    options: {{distill: {{bits: 4/4}}}}
    paper-reference: 4.26
  - name: 8/8
    options: {{distill: {{bits: 8/8}}}}
rows:
  - name: none
    options: {{dilate: {{scaling: none}}, calibrate: {{scaling: keep}}}}
    paper: {{4/4: 9.63}}
  - name: SmoothQuant
    groups: [4/4]
    options: {{dilate: {{scaling: none}}, calibrate: {{scaling: smoothquant}}}}
  - name: theirs
    paper-only: true
    paper: {{4/4: 30.69}}
"""
