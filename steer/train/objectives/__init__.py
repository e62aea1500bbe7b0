"""Training objectives of policies: six tables of pure functions, and the registry in which a paper is one row."""
