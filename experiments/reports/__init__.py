"""Tables and pages made from finished runs."""
