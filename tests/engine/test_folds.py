"""Norms and sums that the products of a layer do themselves: which ones, and that nothing is left out or done twice.

The kernels need a GPU; here PyTorch does what they do.
"""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run.engine import Engine, SamplingParams
from octo_run.kernels import step as ops
from octo_run.kernels.linear.around import WAYS, taken_in
from octo_run.kernels.step import reference
from octo_run.models.cache import DEMO_PATH
from octo_run.models.linear import Linear

BASE: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 192, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 1024, "initializer_range": 0.1,
    "bos_token_id": 1, "eos_token_id": 4, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2}
#: By kind of model: what else it is, and norms and sums of a step that products do.
KINDS: dict[str, tuple[dict[str, Any], int, int]] = {
    "llama": ({}, 6, 6),
    "qwen2": ({}, 6, 6),
    "qwen3": ({"num_key_value_heads": 3}, 6, 6),
    "qwen3_moe": (MOE, 1, 3),  # the first layer's norm; behind the others' stand experts
    "gemma2": ({}, 1, 0),  # what is added is normed first
    "granite": ({"residual_multiplier": 0.5}, 0, 0),
    "cohere2": ({}, 0, 0),  # attention and MLP see the same
    "olmo2": ({}, 0, 0),
}

DONE: Counter[str] = Counter()


def takes_in(self: Linear, x: Tensor, norm: Tensor | None = None) -> bool:
    return len(x) == 1


def apply(self: Linear, x: Tensor, out: Tensor, around: ops.Around = ops.ALONE) -> None:
    if around.norm is not None:
        DONE["norm"] += 1
        given, x = x, torch.empty_like(x)
        reference.add_rms_norm(given, None, around.norm, around.eps, x)
    DONE["steps"] += self.weight.shape[0] == BASE["vocab_size"]
    made = x @ self.weight.to(x.dtype).T + (0 if self.bias is None else self.bias)
    DONE["sum"] += around.add
    out.copy_(out + made if around.add else made)


def apply_swiglu(self: Linear, x: Tensor, out: Tensor, around: ops.Around = ops.ALONE) -> bool:
    both = x.new_empty(len(x), self.weight.shape[0])
    self.apply(x, both, around)
    reference.swiglu(both, out)
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_same_where_products_do_what_is_around_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    changes, norms, sums = KINDS[kind]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(BASE | changes)))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.add_(0.3 * torch.randn_like(tensor))
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DEMO_PATH / name, tmp_path)
    found = []
    for folded in (False, True):
        if folded:
            for function in (takes_in, apply, apply_swiglu):
                monkeypatch.setattr(Linear, function.__name__, function)
        with Engine.load(str(tmp_path), kv="bf16", device="cpu", dtype="float32", max_context=256) as engine:
            prompt = list(range(100, 140))
            params = SamplingParams(temperature=0, max_tokens=6)
            engine.end_ids = frozenset()
            list(engine.generate(prompt, params))
            DONE.clear()
            tokens = list(engine.generate(prompt, params))
            found.append(([token.id for token in tokens], [token.logprob for token in tokens]))
    assert found[0][0] == found[1][0]
    assert torch.allclose(torch.tensor(found[0][1]), torch.tensor(found[1][1]), atol=2e-5)
    steps = DONE["steps"]
    assert (DONE["norm"], DONE["sum"]) == (norms * steps, sums * steps), "of each step"


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["bf16", "int4", "int8", "fp8"])
def test_the_kernels_do_what_is_around_them(weights: str) -> None:
    """With all ways a step's logits are those without, but for rounding, for one sequence and for several; recorded
    steps give the tokens of steps that are not."""
    before, found, tokens = set(taken_in), [], []
    ids = list(range(100, 400))
    try:
        for ways in ((), WAYS):
            taken_in.clear()
            taken_in.update(ways)
            with Engine.load("octo-demo", device="cuda", kv="oct3", weights=weights, max_context=1024) as engine:
                engine.end_ids = frozenset()
                found.append(engine.logits(ids, step=1)[-40:].float().cpu())
                params = SamplingParams(temperature=0, max_tokens=12)
                tokens.append([token.id for token in engine.generate(ids, params)])
                again = [token.id for token in engine.generate(ids, params)]
                assert again == tokens[-1]
                together = engine.generate_batch([ids] * 3, params)
                assert all(answer.ids == tokens[-1] for answer in together) or weights == "bf16"
    finally:
        taken_in.clear()
        taken_in.update(before)
    spread = found[0].std(-1, keepdim=True)
    assert float(((found[1] - found[0]) / spread).abs().mean()) < 0.03
    assert float((found[1].argmax(-1) == found[0].argmax(-1)).float().mean()) > 0.9
