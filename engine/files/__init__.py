"""What a model's files hold: safetensors, GGUF, JSON, and the cache of quantised weights."""
