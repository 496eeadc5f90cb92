"""The GGUF file that a peer is timed with holds the model's own weights, in the order that the format has."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from octo_run.models.cache import DEMO_PATH
from octo_run.models.config import load_config
from octo_run.models.gguf.architectures import ARCHITECTURES
from octo_run.models.gguf.config import model_config
from octo_run.models.gguf.header import read_model
from octo_run.models.gguf.names import sources
from octo_run.models.gguf.tensors import read_tensor
from octo_run.models.weights import load_weights


@pytest.mark.parametrize(("kind", "error"), [("f16", 1e-6), ("q8_0", 0.006), ("q4_1", 0.09)])
def test_the_file_is_the_model(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: float
) -> None:
    out = tmp_path / "demo.gguf"
    monkeypatch.setattr("sys.argv", ["write_gguf.py", "octo-demo", str(out), "--type", kind])
    script("write_gguf").main()
    assert [path.name for path in tmp_path.iterdir()] == ["demo.gguf"]
    cfg, model = load_config(DEMO_PATH), read_model(out)
    _, written = model_config(model, {"bos_token_id": cfg.bos_token_id, "eos_token_id": list(cfg.eos_token_ids)})
    assert written == cfg
    weights = load_weights(DEMO_PATH, cfg, "cpu", torch.float32)
    for name, source in sources(model, ARCHITECTURES["llama"], cfg).items():
        found = read_tensor(name, source).float()
        assert float((found - weights[name]).norm() / weights[name].norm()) <= error, name


def test_other_models_are_refused(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = script("write_gguf")
    other = load_config(DEMO_PATH).__class__(**{**vars(load_config(DEMO_PATH)), "qkv_bias": True})
    monkeypatch.setattr(bench, "load_config", lambda _: other)
    monkeypatch.setattr("sys.argv", ["write_gguf.py", "octo-demo", "never.gguf"])
    with pytest.raises(SystemExit, match="octo-demo is no plain Llama model"):
        bench.main()
