"""Parts that all engines of language models share; no engine is imported."""
