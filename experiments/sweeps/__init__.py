"""Sweeps: the plan, its trials, and their processes."""
