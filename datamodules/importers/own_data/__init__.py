"""Data of your own: JSON lines, Hugging Face data sets, COCO detection files."""
