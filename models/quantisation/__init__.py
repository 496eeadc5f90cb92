"""Quantised weights: the schemes by which octo-run makes them, and the formats of files that hold them."""
