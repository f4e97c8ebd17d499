"""The user's own data: JSON lines, Hugging Face data sets, COCO detection files."""
