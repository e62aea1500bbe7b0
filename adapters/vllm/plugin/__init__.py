"""Steering inside vLLM's own processes, and the way of one edit through them.

1. A client asks for `{"edits": [{"name": "calm", "strength": 0.15, "scope": "reply"}]}` in `extra_args["steer"]`, or
   the adapter asks for the same as `Inside` (`requests`).
2. Front end: `install` hands it to `Registry.parse` (`registry`), which checks it. `Registry.resolve` turns names into
   digests and scopes into positions of this prompt: a `Resolved` (`requests`), packed as plain data.
3. Engine: `install` gives blocks of the prefix cache keys of their own (`Resolved.block_key`), and sends a request
   whose gate has read the prompt back to where its steering begins.
4. Worker: `runner_v1` or `runner_v2` says before each pass which tokens run. `Worker.step` (`worker`) makes a `Request`
   of each `Resolved`, and of the edits that act on a stretch of the text one `Row` (`compiled`): a vector to add at
   every block, and closed forms of all other operators.
5. `Slots` (`slots`) writes the row into the buffers of every `BlockSteering` (`blocks`) and says which slot each token
   has. The block's hook reads `add[slot]`, and strength 0.15 has reached the residual stream.
6. A value head takes the other road: `values` tilts the logits. A tuned model runs beside the base: `tuned` reads it,
   `mixture` mixes the two laws.
"""
