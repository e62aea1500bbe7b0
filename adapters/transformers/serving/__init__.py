"""`steer serve` on transformers: requests decoded together, searches beside them."""
