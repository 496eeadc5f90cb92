"""The size of a page of the arena."""

PAGE_TOKENS = 64
"""Tokens of one page, for K and for V. Written here alone; kernels derive their constants from it."""
