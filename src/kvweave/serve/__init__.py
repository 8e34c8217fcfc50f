"""Serving: `kvweave serve`, an OpenAI endpoint whose contexts are compressed once. See docs/SERVING.md."""
