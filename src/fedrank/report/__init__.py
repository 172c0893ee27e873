"""Pages of runs and of comparisons: one file that needs nothing else, or served while they grow."""
