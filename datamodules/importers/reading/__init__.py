"""Read and check annotation files, for every source."""
