"""`scripts/soak`: the goals of a server that holds under load and faults, each counted."""
