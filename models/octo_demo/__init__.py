"""The embedded demo model: weights, tokenizer and configuration as package data."""
