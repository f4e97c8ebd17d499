"""Sampling in this process."""
