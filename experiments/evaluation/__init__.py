"""Which predictor a model gets, and how questions are divided over processes."""
