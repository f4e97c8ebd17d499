"""Read and write shards of samples, and define the order and the position of training."""
