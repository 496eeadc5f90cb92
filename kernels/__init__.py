"""Operations on the coded KV arena; each dispatches on the device of its inputs."""

from octo_run.kernels.attention import (
    PAGE_TOKENS,
    AttentionInputs,
    AttentionSpec,
    attend,
    attend_reference,
    attention_host_bytes,
    attention_workspace_bytes,
    page_bytes,
)
from octo_run.kernels.encode import encode_pages, encode_pages_reference
from octo_run.kernels.preparation import prepare

__all__ = [
    "PAGE_TOKENS",
    "AttentionInputs",
    "AttentionSpec",
    "attend",
    "attend_reference",
    "attention_host_bytes",
    "attention_workspace_bytes",
    "encode_pages",
    "encode_pages_reference",
    "page_bytes",
    "prepare",
]
