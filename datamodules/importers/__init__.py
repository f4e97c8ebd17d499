"""Published data sets, read in their own formats and written as shards of samples."""
