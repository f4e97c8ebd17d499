"""What answers are worth: official readers, scores, averages, and their files."""
