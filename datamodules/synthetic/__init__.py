"""The synthetic dataset: a seeded generator of scenes and questions in the file formats of the real benchmarks."""
