"""Weight sets: where a model's files come from and how they run."""
