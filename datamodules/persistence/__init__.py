"""Files that survive a kill, and child processes that end with their parent."""
