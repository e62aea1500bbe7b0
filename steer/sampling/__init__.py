"""What samplers are built from: weights, lookaheads, trees."""
