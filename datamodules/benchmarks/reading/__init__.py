"""How the files of several benchmarks are read: masks, polygons, Parquet, photographs that EXIF turns."""
