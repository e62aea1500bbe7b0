"""Parts that samplers are built from: weights, lookaheads, trees."""
