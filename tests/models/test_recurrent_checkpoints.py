"""Files of families with recurrent layers: quantised matrices, rows in groups, and what configurations are refused."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octo_run.errors import OctoError
from octo_run.models.config import parse_config

_stored: dict[str, Any] = runpy.run_path(str(Path(__file__).parent / "test_quantised_checkpoints.py"))
QWEN35: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "num_hidden_layers": 4, "head_dim": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 64,
}  # fmt: skip
NEXT = QWEN35 | {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "num_experts": 0}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["ct fp8 channel", "ct w4a16", "gptq act-order", "awq"])
@pytest.mark.parametrize("changes", [QWEN35, NEXT], ids=["Qwen3.5", "Qwen3-Next"])
def test_quantised_matrices(name: str, changes: dict[str, Any], make_checkpoint: Callable[..., Path]) -> None:
    """All of a layer, but for the gates' few rows."""
    config, writer = _stored["FORMATS"][name]

    def choose(prefix: str) -> Any:
        gates = prefix.endswith(("in_proj_a", "in_proj_b", "in_proj_ba"))
        return None if gates or not prefix.startswith("model.layers.") else writer

    packed, dense = _stored["quantised"](make_checkpoint, config, _stored["by_name"](choose), **changes)
    _stored["same_logits"](packed, dense)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"linear_num_value_heads": 5}, r"linear_num_value_heads \(5\) is no multiple of linear_num_key_heads \(2\)"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim is 0, not a whole number from 1 to 16"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types holds no 'full_attention'"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types holds 'sliding_attention', which octo-run does not"),
        ({"full_attention_interval": 8}, "layer_types holds no 'full_attention'"),
        ({"linear_key_head_dim": 1024}, "linear_key_head_dim is 1024, not a whole number from 1 to 256"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
             "num_key_value_heads": 1, "max_position_embeddings": 512}  # fmt: skip
    parse_config(QWEN35 | sizes, tmp_path / "config.json")
    with pytest.raises(OctoError, match=words):
        parse_config(QWEN35 | sizes | changes, tmp_path / "config.json")


def test_layers_by_the_interval(tmp_path: Path) -> None:
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
             "num_key_value_heads": 1, "max_position_embeddings": 512, "num_hidden_layers": 7}  # fmt: skip
    cfg = parse_config(QWEN35 | sizes | {"full_attention_interval": 3}, tmp_path / "config.json")
    assert cfg.attention_layers == (2, 5)
    assert parse_config(QWEN35 | sizes, tmp_path / "config.json").attention_layers == (3,)
