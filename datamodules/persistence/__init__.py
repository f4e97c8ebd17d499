"""Files that stay valid if the process is killed, and child processes that end with their parent."""
