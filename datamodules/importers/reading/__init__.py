"""How annotation files are read and checked, for every source."""
