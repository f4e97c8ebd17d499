"""File formats that several benchmarks share: masks, polygons, Parquet, photographs that EXIF rotates."""
