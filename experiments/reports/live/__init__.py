"""The report of a running experiment, served on this machine."""
