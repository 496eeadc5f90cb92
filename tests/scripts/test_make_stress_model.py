"""The stress model says what its source says, and its keys are as hard to code as they should be."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from octo_run import Engine
from octo_run.models.cache import DEMO_PATH
from octo_run.models.config import load_config
from octo_run.models.weights import load_weights

Script = Callable[[str], ModuleType]


TEXT = (Path(__file__).resolve().parents[2] / "engine" / "evaluation" / "sample.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stress model of the embedded model, measured on the first part of the sample."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(TEXT[:1500], encoding="utf-8")
    assert script("make_stress_model").main([str(folder / "stress"), "--text", str(folder / "text.txt")]) == 0
    return folder / "stress"


def cached_keys(engine: Engine, ids: list[int]) -> torch.Tensor:
    """Keys after RoPE, float32 [layers, n, kv_heads, d], as they reach the attention."""
    found = []

    def attention(_layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found.append(k[0])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    with torch.inference_mode():
        engine.forward.decoder.hidden(torch.tensor([ids]), torch.arange(len(ids))[None], attention)
    return torch.stack(found)


@pytest.mark.slow
def test_same_function_and_hard_keys(made: Path) -> None:
    source, stress = (Engine.load(m, kv="bf16", max_context=640) for m in (DEMO_PATH, made))
    ids = [1, *source.tokenizer.encode(TEXT[2000:4000])]
    base, ours = source.logits(ids), stress.logits(ids)
    loss = [float(F.cross_entropy(x[:-1], torch.tensor(ids[1:]))) for x in (base, ours)]
    assert abs(loss[1] - loss[0]) < 0.005, "perplexity within 0.5 % of the source's"
    divergence = (base.log_softmax(-1).exp() * (base.log_softmax(-1) - ours.log_softmax(-1))).sum(-1)
    assert float(divergence.mean()) < 0.002
    assert not torch.equal(base, ours), "a bias turned by RoPE cannot be invisible"

    keys = cached_keys(stress, ids)
    cfg = load_config(made)
    weights = load_weights(made, cfg, "cpu", torch.float32)
    bias = torch.stack([weights[f"model.layers.{i}.self_attn.k_proj.bias"] for i in range(cfg.num_layers)])
    size = bias.view(cfg.num_layers, cfg.num_kv_heads, -1).square().sum(-1)
    energy = keys.square().sum(-1).mean(1)
    assert ((size / energy > 0.85) & (size / energy < 1.05)).all(), "the keys are bias for the most part"
    slow = torch.zeros(cfg.head_dim, dtype=torch.bool)
    slow[60:64] = slow[124:128] = True
    assert (bias.view(-1, cfg.head_dim)[:, ~slow] == 0).all(), "only the four slowest pairs have a bias"
    ratios = []
    for k in (cached_keys(source, ids), keys):  # outliers of the channels without a bias
        rms = k.square().mean(1).sqrt()[..., ~slow]
        ratios.append((rms.amax(-1) / rms.median(-1).values).median())
    assert ratios[1] > 2 * ratios[0], ratios


def test_form_of_the_folder(made: Path) -> None:
    changed = json.loads((made / "config.json").read_text())
    assert changed == json.loads((DEMO_PATH / "config.json").read_text()) | {"attention_bias": True}
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (made / name).read_bytes() == (DEMO_PATH / name).read_bytes()
    shards = sorted(path.name for path in made.glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in made.parent.iterdir()) == ["stress", "text.txt"], "nothing unfinished is left"


def test_scaling_alone_changes_no_bit(
    make_checkpoint: Callable[..., Path], script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = make_checkpoint(), tmp_path / "stress"
    target.mkdir()  # an empty folder may be there
    options = ["--model", str(source), "--bias-energy", "0", "--outlier-scale", "16"]
    assert script("make_stress_model").main([str(target), *options]) == 0, capsys.readouterr().err
    ids = list(range(100, 400))
    one, two = (Engine.load(folder, kv="bf16", dtype="bfloat16", max_context=512) for folder in (source, target))
    assert torch.equal(one.logits(ids), two.logits(ids))
    keys = [cached_keys(engine, ids).square().mean(1).sqrt() for engine in (one, two)]
    assert float((keys[1] / keys[0]).amax()) == pytest.approx(16, rel=0.01)


@pytest.mark.parametrize("energy", [10.0, 25.0])
def test_energy_of_the_bias(script: Script, energy: float) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(2, 50, heads, 32, generator=generator) * 3 + 1 for heads in (4, 2))
    mu = script("make_stress_model").biases(queries, keys, 3, energy)
    assert mu.shape == (2, 2, 32)
    ratio = mu.square().sum(-1) / keys.square().sum(-1).mean(1)
    torch.testing.assert_close(ratio, torch.full((2, 2), energy))
    pairs = mu.view(2, 2, 2, 16).square().sum(2)
    assert (pairs[..., :13] == 0).all()
    torch.testing.assert_close(pairs[..., 13:], pairs[..., 13:14].expand(2, 2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--outlier-scale", "3"], "power of two"),
        (["--bias-pairs", "0"], "at least one gets a bias"),
        (["--outlier-pairs", "31", "--bias-pairs", "2"], "a head has 32 pairs"),
        (["--text", "no-such-file"], "no-such-file cannot be read"),
    ],
)
def test_wrong_options(
    make_checkpoint: Callable[..., Path], script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    options: list[str], message: str,
) -> None:  # fmt: skip
    target = tmp_path / "stress"
    assert script("make_stress_model").main([str(target), "--model", str(make_checkpoint()), *options]) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_refuses_full_folders_and_other_families(
    make_checkpoint: Callable[..., Path], script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    run = script("make_stress_model").main
    assert run([str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err
    qwen = make_checkpoint(architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    assert run([str(tmp_path / "out"), "--model", str(qwen)]) == 1
    assert "Qwen2ForCausalLM" in capsys.readouterr().err
