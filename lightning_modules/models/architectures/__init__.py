"""The structure of each model family that can be trained: one file per family, and one line in `registry`."""
