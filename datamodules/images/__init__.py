"""Images: files, headers, pixels, and photographs that EXIF rotates."""
