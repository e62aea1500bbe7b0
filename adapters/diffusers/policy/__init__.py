"""Diffusion policies on networks and pipelines of diffusers."""
