"""Nano replicas of the benchmarks: scenes of the synthetic dataset in each benchmark's own files."""
