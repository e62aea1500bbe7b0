"""The embedded image model and its judge: how they are trained."""
