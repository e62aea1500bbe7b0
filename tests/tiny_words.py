"""Words of tiny models that tests other than the fixtures name."""

MASKED_WORDS = "the a sun rain day night is was good bad happy sad dog cat runs sings loud calm very not"
