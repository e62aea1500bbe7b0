"""Results drawn as pictures; only commands import them."""
