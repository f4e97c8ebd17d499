"""The model without gradients, for sampling and for the frozen reference: a CPU version, a GPU version, and the plain
model.
"""
