"""Comparisons: methods over the same data, seeds, rounds and tuning effort, and what may be concluded from them."""
