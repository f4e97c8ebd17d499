"""Nano replicas of the benchmarks: scenes of the nano world in each benchmark's own files."""
