"""Steering inside vLLM's own processes."""
