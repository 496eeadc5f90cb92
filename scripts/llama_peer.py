"""llama.cpp through llama-cpp-python, for the scripts that compare with it."""

from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found]


def load(file: str | Path, *, kv: str, context: int, threads: int, **options: Any) -> Any:
    """A model of a GGUF file with one KV format (``f16``, ``q8_0``, ``q4_0``) for keys and values.

    Its AMX buffers end in a segmentation fault on some virtual machines, so it does without them.
    """
    library, kind = llama_cpp.llama_cpp, getattr(llama_cpp, f"GGML_TYPE_{kv.upper()}")
    defaults = library.llama_model_default_params

    def without_extra_buffers() -> object:
        params = defaults()
        params.use_extra_bufts = False
        return params

    library.llama_model_default_params = without_extra_buffers
    try:
        return llama_cpp.Llama(
            str(file), n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, type_k=kind, type_v=kind,
            verbose=False, **options,
        )  # fmt: skip
    finally:
        library.llama_model_default_params = defaults
