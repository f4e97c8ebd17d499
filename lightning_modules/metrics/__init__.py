"""The numbers of an evaluation: accuracy, averages, intervals."""
