"""Read published data sets in their original formats and write them as shards of samples."""
