"""Benchmarks: read their original files into samples, and score the answers."""
