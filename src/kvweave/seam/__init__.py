"""Where kvweave meets transformers: the cache, the attention, the session around a model."""
