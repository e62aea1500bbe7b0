"""What steering costs, in figures: `python -m steer.bench`, run by `make bench`."""
