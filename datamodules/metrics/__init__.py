"""Evaluate answers: official parsers, scores, averages, and result files."""
