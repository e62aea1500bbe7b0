"""Policies of text: tuned with TRL, saved, opened again."""
