"""``octo-run eval``: what a KV format does to a model's answers."""
