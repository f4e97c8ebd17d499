"""What all pages draw with: templates, charts, small copies of images."""
