"""The size of a page of the arena."""

PAGE_TOKENS = 64
"""Tokens of one page, for K and for V. Written here alone; kernels derive their constants from it."""


def longest_unpaged(sink: int) -> int:
    """The most tokens, a query's own included, at which a sequence with so many sinks cannot have a page."""
    return sink + PAGE_TOKENS
