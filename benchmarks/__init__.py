"""Benchmarks of the server and of its engine; ``scripts/benchmark`` runs them."""
