"""The nano base model: how it is built and pretrained."""
