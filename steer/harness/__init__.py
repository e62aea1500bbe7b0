"""Other people's evaluation harnesses over steered models: lm-eval's model class and Inspect's provider."""
