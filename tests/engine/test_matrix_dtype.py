"""What matrices that are not quantised are held in: bfloat16 ones on a CPU that computes in float32 change nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from octo_run.engine import Engine
from octo_run.engine.parts import held_bytes
from octo_run.errors import UsageError

from .test_families import MODELS, written


@pytest.mark.few("oct3-True")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv", ["bf16", "oct3"])
def test_bf16_weights_are_the_files_and_take_half(tied: bool, kv: str, make_checkpoint: Callable[..., Path]) -> None:
    """Stored in bfloat16, multiplied in float32: in chunks and in steps the logits are those of float32 weights."""
    path = make_checkpoint(tie_word_embeddings=tied, attention_bias=True)
    ids = torch.randint(3, 200, (90,)).tolist()
    wide, narrow = (Engine.load(path, kv=kv, device="cpu", max_context=256, weights=name) for name in ("fp32", "bf16"))
    assert (wide.plan.weight_format, narrow.plan.weight_format) == ("fp32", "bf16")
    assert narrow.plan.weights < 0.52 * wide.plan.weights
    decoder = narrow.forward.decoder
    parts = decoder.embedding, decoder.final_norm, decoder.head, decoder.layers
    assert sum(held_bytes(*parts, but=(decoder.key_tensors,))) == narrow.plan.weights
    for step in (None, 1, 7):
        found, expected = narrow.logits(ids, step), wide.logits(ids, step)
        assert (found - expected).norm() < (2e-6 if kv == "bf16" else 2e-3) * expected.norm()


def test_in_16_bit_arithmetic_there_is_nothing_to_choose(make_checkpoint: Callable[..., Path]) -> None:
    path = make_checkpoint()
    half = Engine.load(path, device="cpu", dtype="float16", max_context=256, weights="bf16")
    assert half.forward.decoder.embedding.dtype == torch.float16
    with pytest.raises(UsageError, match="--weights fp32 is for arithmetic in float32: give --dtype float32"):
        Engine.load(path, device="cpu", dtype="bfloat16", weights="fp32")


def test_layers_that_share_keys_and_values_are_held_in_bf16_too(tmp_path: Path) -> None:
    written(tmp_path, *MODELS["gemma4-small"])
    wide, narrow = (Engine.load(tmp_path, device="cpu", max_context=256, weights=name) for name in ("fp32", "bf16"))
    assert (wide.plan.weight_format, narrow.plan.weight_format) == ("fp32", "bf16")
    assert narrow.plan.weights < 0.6 * wide.plan.weights
    ids = list(range(3, 93))
    found, expected = narrow.logits(ids), wide.logits(ids)
    assert (found - expected).norm() < 1e-2 * expected.norm(), "the file's weights are in float32"
