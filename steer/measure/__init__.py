"""Measurements of steering: strength, cost, budgets, guidance, distances."""
