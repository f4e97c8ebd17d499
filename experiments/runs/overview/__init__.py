"""All runs below outputs/ in one table, and the removal of what is no longer needed."""
