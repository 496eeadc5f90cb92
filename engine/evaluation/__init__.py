"""Measurements of quality: perplexity, retrieval, tasks, and the codecs on their own."""
