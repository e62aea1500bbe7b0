"""vLLM behind `steer serve`, and steer inside `vllm serve`."""
