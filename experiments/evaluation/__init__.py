"""Choose the predictor of a model, and divide questions among processes."""
