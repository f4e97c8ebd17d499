"""What an example is: the sample, its boxes, and the text of its answer."""
