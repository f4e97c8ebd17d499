"""The inside of each family of models that can be trained: one file for a family, and one line in `registry`."""
