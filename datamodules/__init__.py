"""Samples, boxes, answers, prompts, shards and batches: everything before a model sees a tensor."""
