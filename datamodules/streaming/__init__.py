"""Samples on disk, the order of training, and a position in it."""
