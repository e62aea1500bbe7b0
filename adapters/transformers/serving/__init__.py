"""`steer serve` on transformers, and the way of one request through it.

1. A route of `steer.serving` reads a body into a `Task`, which names no engine.
2. `TransformersEngine` (`engine`) takes it to the `Preparer` (`preparing`): messages become tokens, names
   of artifacts edits, a sampler's settings a plan. What is wrong is answered here.
3. The `Scheduler` (`scheduler`) has one worker thread. A plain request becomes one `Row` a choice in the
   running `Batch` (`batch`): all rows draw one token a step, each under its own edits, temperature, seed
   and end.
4. The rows' caches lie in one rectangle, or one by one where a network cannot have that (`slots`); laws
   of the next token are those of `steer.sampling.laws`, with a column of settings for each row.
5. A search runs a token at a time between steps of the batch, for its share of the time (`turns`).
6. Tokens, progress and results go back as `Event`s, from which a route writes the answer. Whoever leaves
   is cancelled before the next token.
"""
