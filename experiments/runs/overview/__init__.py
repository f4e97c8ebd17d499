"""All runs below outputs/ in one table, and the removal of files that are no longer needed."""
