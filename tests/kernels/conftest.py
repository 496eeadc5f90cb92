"""What the tests of kernels share."""

import os

import pytest


@pytest.fixture(autouse=True)
def _interpreter_with_new_numpy(monkeypatch):
    """Triton 3.6's interpreter turns one-element arrays into loop bounds by int(), which NumPy 2.4 no longer does."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime import interpreter

        original = interpreter._patch_lang_tensor

        def patch(tensor, scope):
            original(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
