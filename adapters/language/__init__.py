"""What all engines of language models share; it imports no engine."""
