"""The generation engine: scheduler, KV cache, model runner, sampler, and vLLM behind the same interface."""
