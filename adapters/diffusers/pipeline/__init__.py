"""Pipelines of diffusers as denoisers: their own calls, recorded and replayed."""
