"""Training of diffusion policies: losses, rounds, saved states; no engine."""
