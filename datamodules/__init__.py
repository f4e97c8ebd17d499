"""Samples, boxes, answers, prompts, shards and batches: all work before the model gets a tensor."""
