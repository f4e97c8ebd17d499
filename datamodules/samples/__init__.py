"""Samples, boxes, and parsers for the texts of answers."""
