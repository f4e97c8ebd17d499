"""A page of an evaluation's answers: one model, or two beside each other."""
