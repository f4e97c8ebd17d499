"""Synthetic questions that several boxes in several images answer."""
