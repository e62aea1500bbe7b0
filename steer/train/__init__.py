"""Training of what steers: vectors, controllers, value heads and policies."""
