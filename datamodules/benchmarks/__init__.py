"""Benchmarks: their own files read into samples, and their scoring."""
