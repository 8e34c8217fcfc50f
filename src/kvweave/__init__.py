"""KV-cache compression for multimodal LLMs on Hugging Face Transformers."""
