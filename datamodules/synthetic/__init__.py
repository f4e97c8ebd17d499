"""The nano world: a seeded generator of scenes and questions in the real benchmarks' own formats."""
