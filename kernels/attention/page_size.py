"""The size of a page of the arena."""

from octo_run.kernels.page_size import PAGE_TOKENS as PAGE_TOKENS
