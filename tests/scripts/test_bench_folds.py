"""The comparison of what products do beside multiplying, as a whole on a CPU, where none of the ways is taken."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from octo_run.kernels.linear.around import WAYS, taken_in

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 256,
    "max_position_embeddings": 2048, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def test_every_way_has_a_line(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, before = script("bench_folds"), set(taken_in)
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    out = tmp_path / "folds"
    command = [
        "bench_folds",
        "--shape",
        str(tmp_path / "shape.json"),
        "--device",
        "cpu",
        "--steps",
        "2",
        "--rounds",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--json", f"{out}.json", "--markdown", f"{out}.md"])
    try:
        bench.main()
        assert not taken_in, "whoever measures leaves none"
    finally:
        taken_in.update(before)
    rows = json.loads(Path(f"{out}.json").read_text())
    of_bf16 = [row["ways"] for row in rows if row["weights"] == "bf16"]
    assert of_bf16[0] == of_bf16[-1] == [] and {*of_bf16[-2]} == {way for way in WAYS if not way.startswith("packed")}
    assert {way for row in rows for way in row["ways"]} == {*WAYS}
    assert all(row["logits"] == 0 for row in rows) and "| vector sum | " in Path(f"{out}.md").read_text()
