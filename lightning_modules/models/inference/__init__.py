"""The model without gradients, for sampling and for the frozen reference: on a CPU, on a GPU, or as it is."""
