"""Benchmarks of what steering costs: `python -m steer.bench`, run by `make bench`."""
