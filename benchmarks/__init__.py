"""Benchmarks: `python -m benchmarks.<name>` prints a table of ours beside the peer's."""
