"""The model without gradients, for sampling and for the reference: a CPU version, a GPU version, and a plain one."""
