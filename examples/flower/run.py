"""The same run on Flower's simulation runtime and on this machine's own engine: the same adapter, bit for bit."""

import numpy as np

import fedrank

there = fedrank.run("flower.yaml", out="runs/flower")
here = fedrank.run("flower.yaml", "engine.kind=local", out="runs/local")
for name, block in here.state.adapter.blocks.items():
    for ours, theirs in zip(block.rows.values(), there.state.adapter.blocks[name].rows.values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
print(f"the same adapter; {there.summary['wall_seconds']:.1f} s on Flower, {here.summary['wall_seconds']:.1f} s here")
