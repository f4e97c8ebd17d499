"""Sweeps: the plan, its trials, and where they run."""
