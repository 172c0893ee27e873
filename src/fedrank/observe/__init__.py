"""Who else is told of a run while it is played, one file each."""
