"""What tests of integrations share: devices, and tiny random models of the transformers library."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
#: Of every decoder: two layers, four query heads over two KV heads of 64 numbers.
SIZES = {
    "vocab_size": 300, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device that there is."""
    return str(request.param)


@pytest.fixture
def decoder() -> Callable[..., Any]:
    """``decoder("Llama", device="cpu", dtype=torch.float32, **config)``: a random model that never ends a text."""
    transformers = pytest.importorskip("transformers", minversion="5.24", reason="transformers 5.24 is not installed")

    def make(family: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
        torch.manual_seed(0)
        settings = getattr(transformers, f"{family}Config")(**SIZES | config)
        model = getattr(transformers, f"{family}ForCausalLM")(settings).eval().to(device=device, dtype=dtype)
        model.generation_config.eos_token_id = None
        return model

    return make
