"""Every family of models against transformers: tiny random models that the library writes and the engine loads."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run.cli import main
from octo_run.engine import Engine, SamplingParams
from octo_run.engine.quantise import quantise
from octo_run.errors import UsageError
from octo_run.models import conditioning
from octo_run.models.cache import DEMO_PATH
from octo_run.models.config import load_config
from octo_run.models.decoder import Decoder
from octo_run.models.families import FAMILIES
from octo_run.models.plain_attention import attend_plain
from octo_run.models.weights import load_weights

pytestmark = pytest.mark.usefixtures("coded_windows")

COUNT, ON = 300, "cuda"
SMALL: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e5}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128, "rope_theta": 5e5,
}  # fmt: skip
BIASES = ("attention_bias", "mlp_bias")
TWO = ["sliding_attention", "full_attention"] * 2


def heads(query: int, kv: int, head_dim: int) -> dict[str, int]:
    return {"num_attention_heads": query, "num_key_value_heads": kv, "head_dim": head_dim}


def longrope(pairs: int, original: int = 512) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": original,
            "short_factor": [1.0 + 0.02 * i for i in range(pairs)],
            "long_factor": [1.0 + 0.3 * i for i in range(pairs)],
        },
        "original_max_position_embeddings": original,
    }  # fmt: skip


#: Configuration class without "Config", and its fields beside SMALL.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-g3-d80": ("Llama", {**heads(6, 2, 80), "hidden_size": 96}),
    "llama3-biases": ("Llama", {**heads(4, 2, 64), "rope_parameters": LLAMA3, **dict.fromkeys(BIASES, True)}),
    "internlm3": ("InternLM3", {**heads(4, 2, 64), "rope_parameters": {"rope_type": "dynamic", "factor": 6.0,
                                                                        "rope_theta": 1e5}}),
    "iquestcoder": ("IQuestCoder", {**heads(5, 1, 64), "hidden_size": 80, **dict.fromkeys(BIASES, True)}),
    "mistral-window": ("Mistral", {**heads(4, 1, 64), "sliding_window": 70}),
    "ministral3": (
        "Ministral3",
        {
            **heads(5, 1, 128), "hidden_size": 80,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        },
    ),
    "qwen2-g7-window": (
        "Qwen2",
        {
            **heads(7, 1, 64), "hidden_size": 84, "tie_word_embeddings": True, "sliding_window": 100,
            "use_sliding_window": True, "max_window_layers": 2,
        },
    ),
    "qwen2-yarn": ("Qwen2", {"hidden_size": 256, "rope_parameters": YARN}),
    "qwen3-yarn": ("Qwen3", {**heads(4, 2, 128), "rope_parameters": YARN | {"beta_fast": 16.0}}),
    "gemma": ("Gemma", {**heads(8, 1, 64)}),
    "gemma2": ("Gemma2", {**heads(4, 2, 64), "sliding_window": 70, "query_pre_attn_scalar": 100}),
    "gemma3": (
        "Gemma3Text",
        {
            **heads(4, 1, 256), "sliding_window": 64, "layer_types": TWO, "query_pre_attn_scalar": 168,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "gemma4": (
        "Gemma4Text",
        {
            **heads(8, 2, 64), "global_head_dim": 128, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
            "sliding_window": 70, "layer_types": TWO, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0,
        },
    ),
    "gemma4-wide": ("Gemma4Text", {
        **heads(2, 1, 256), "global_head_dim": 512, "sliding_window": 64, "hidden_size_per_layer_input": 0,
        "layer_types": TWO, "attention_bias": True, "tie_word_embeddings": False,
    }),
    "gemma4-small": (
        "Gemma4Text",
        {
            **heads(4, 2, 64), "global_head_dim": 128, "sliding_window": 70, "layer_types": [*TWO, *TWO[:2]],
            "num_hidden_layers": 6, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 8200,
            "num_kv_shared_layers": 3, "use_double_wide_mlp": True,
        },
    ),
    "gemma4-experts": ("Gemma4Text", {
        **heads(4, 2, 64), "global_head_dim": 128, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "sliding_window": 70, "layer_types": TWO, "hidden_size_per_layer_input": 0, "enable_moe_block": True,
        "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 48,
    }),
    "gemma4-unified": (
        "Gemma4UnifiedText",
        {**heads(4, 2, 64), "global_head_dim": 96, "sliding_window": 70, "layer_types": TWO, "attention_k_eq_v": True},
    ),
    "phi3-short": ("Phi3", {**heads(3, 3, 96), "hidden_size": 288, **longrope(48)}),
    "phi3-long": ("Phi3", {**heads(3, 1, 96), "hidden_size": 288, **longrope(48, original=64)}),
    "phi4-mini": (
        "Phi3",
        {**heads(3, 1, 128), "hidden_size": 384, "tie_word_embeddings": True, "partial_rotary_factor": 0.75,
         **longrope(48, original=64)},
    ),
    "phi3-window": ("Phi3", {"hidden_size": 256, "sliding_window": 90, "partial_rotary_factor": 1.0}),
    "phi3-odd": ("Phi3", {"hidden_size": 256, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4,  # 25 coordinates of 64
    }}),
    "glm4-odd": ("Glm4", {**heads(4, 2, 64), "rope_parameters": {
        "rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.3,  # 19 of 64
    }}),
    "olmo2": ("Olmo2", {**heads(5, 5, 64), "hidden_size": 320}),
    "olmo3": ("Olmo3", {"hidden_size": 256, "sliding_window": 70, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}, "full_attention": YARN | {"rope_theta": 5e5},
    }}),
    "smollm3": ("SmolLM3", {"hidden_size": 256}),
    "granite": (
        "Granite",
        {
            "hidden_size": 256, "embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "logits_scaling": 8.0,
            "residual_multiplier": 0.22, "tie_word_embeddings": True,
        },
    ),
    "granite4": (
        "GraniteMoeHybrid",
        {
            "hidden_size": 256, "embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "logits_scaling": 8.0,
            "residual_multiplier": 0.22, "tie_word_embeddings": True, "num_local_experts": 0,
            "shared_intermediate_size": 192, "layer_types": ["full_attention"] * 4, "position_embedding_type": "rope",
            "mamba_n_heads": 4,
        },
    ),
    "granite4-nope": (
        "GraniteMoeHybrid",
        {
            **heads(6, 2, 64), "hidden_size": 384, "num_local_experts": 0, "shared_intermediate_size": 200,
            "layer_types": ["full_attention"] * 4, "attention_bias": True, "mamba_n_heads": 4,
        },
    ),
    "ernie": ("Ernie4_5", {**heads(6, 2, 64), "tie_word_embeddings": True}),
    "helium": ("Helium", {**heads(4, 2, 64), "hidden_size": 256, **dict.fromkeys(BIASES, True)}),
    "hyperclovax": (
        "HyperCLOVAX",
        {
            "hidden_size": 256, "embedding_multiplier": 12.0, "logits_scaling": 0.125, "residual_multiplier": 0.22,
            "attention_multiplier": 0.015625, **dict.fromkeys(BIASES, True),
        },
    ),
    "vaultgemma": (
        "VaultGemma",
        {**heads(5, 1, 64), "hidden_size": 80, "sliding_window": 70, "query_pre_attn_scalar": 100},
    ),
    "glm": ("Glm", {**heads(4, 2, 64)}),
    "glm4": ("Glm4", {**heads(4, 2, 64)}),
    "exaone4": ("Exaone4", {"hidden_size": 256, "sliding_window": 70, "layer_types": TWO}),
    "exaone4-whole": ("Exaone4", {"hidden_size": 256, "sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "seed-oss": ("SeedOss", {**heads(8, 1, 64), "attention_out_bias": True}),
    "cohere": ("Cohere", {"hidden_size": 256, "logit_scale": 0.25}),
    "cohere2": ("Cohere2", {"hidden_size": 256, "sliding_window": 70, "logit_scale": 0.25}),
}  # fmt: skip
#: Models whose families other ones stand for where there is little time.
VARIANTS = {
    "llama-g3-d80", "qwen2-yarn", "gemma4", "gemma4-wide", "gemma4-unified", "phi3-short", "phi3-long", "phi3-window",
    "exaone4-whole", "glm4-odd",
}  # fmt: skip


@torch.no_grad()
def randomised(model: Any, seed: int = 0) -> Any:
    """The model with weights that leave no part of it without effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            # A layer adds little to what is there, as in a trained model.
            scale = (
                (2 * SMALL["num_hidden_layers"]) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            )
            weight.normal_(0, 0.7 * scale * weight.shape[-1] ** -0.5, generator=generator)
            if len(weight) == SMALL["vocab_size"]:  # some tokens are likelier than others, as in a trained model
                weight.mul_(torch.randn(len(weight), 1, generator=generator).exp())
        elif name.endswith("bias"):
            weight.normal_(0, 0.2, generator=generator)
        else:
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
            if "gemma4" in model.config.model_type and name.endswith("q_norm.weight"):  # attention has no scale there
                weight.mul_(len(weight) ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.add_(torch.randn(1, generator=generator) * 0.2)
    return model


def written(folder: Path, kind: str, fields: dict[str, Any], shards: bool = False) -> Any:
    """Write a random model and the demo's tokenizer to ``folder``; transformers' model."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**(SMALL | fields))
    config._attn_implementation = "eager"
    model = randomised(transformers.AutoModelForCausalLM.from_config(config)).eval()
    model.save_pretrained(folder, max_shard_size="300KB" if shards else "1GB")
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DEMO_PATH / file, folder / file)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any, Tensor]]:
    """A model of ``MODELS``: its folder, and transformers' model and logits of ``COUNT`` tokens."""
    known: dict[str, tuple[Path, Any, Tensor]] = {}

    def get(name: str) -> tuple[Path, Any, Tensor]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            kind, fields = MODELS[name]
            model = written(folder, kind, fields, shards=name.startswith(("llama", "glm")))
            with torch.inference_mode():
                known[name] = folder, model, model(torch.tensor([tokens()])).logits[0]
        return known[name]

    return get


def tokens() -> list[int]:
    return torch.randint(0, 8192, (COUNT,), generator=torch.Generator().manual_seed(7)).tolist()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def stepped(engine: Engine, ids: list[int], first: int) -> Tensor:
    """Logits of the tokens from ``first`` on, each of which goes through a decode step."""
    sequence, found = engine.arena.open(), []
    engine.feed(sequence, ids[:first])
    for token in ids[first:]:
        engine.step.start(sequence, token, SamplingParams(temperature=0.0))
        engine.step.launch([sequence])
        found.append(engine.step.logits[0].float().clone())
        engine.step.read(sequence)
    sequence.close()
    return torch.stack(found)


#: Of the families those that have something of their own.
ONE_OF_A_KIND = ("llama3-biases", "qwen3-yarn", "gemma3", "gemma4-small", "phi4-mini", "phi3-odd", "olmo3",
                 "cohere2", "granite")  # fmt: skip


@pytest.mark.few(*ONE_OF_A_KIND)
@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.slow] * (one in VARIANTS)) for one in MODELS])
@torch.inference_mode()
def test_logits_equal_those_of_transformers(name: str, made: Callable[[str], tuple[Path, Any, Tensor]]) -> None:
    """In chunks of several sizes and step by step, at every position."""
    path, _, theirs = made(name)
    engine, ids = Engine.load(path, kv="bf16", device="cpu", max_context=512), tokens()
    assert engine.dtype == torch.float32
    for step in (None, 65):
        assert relative(engine.logits(ids, step), theirs) < 1e-4, f"in chunks of {step}"
    first = 180  # two pages are coded on the way
    assert relative(stepped(engine, ids, first), theirs[first:]) < 1e-4, "step by step"


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma3", {"attn_logit_softcapping": 5.0}),
        ("olmo3", {"sliding_window_pattern": 2, "layer_types": None}),
        ("gemma2", {"sliding_window_pattern": 3, "layer_types": None}),
        ("ministral3", {"rope_parameters": None, "rope_theta": 5e5}),
        ("gemma4-small", {"rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        }}),
    ],
)  # fmt: skip
@torch.inference_mode()
def test_fields_that_mean_nothing_to_transformers(
    name: str, change: dict[str, Any], made: Callable[[str], tuple[Path, Any, Tensor]], tmp_path: Path
) -> None:
    """Those that its class of the family does not read."""
    import transformers

    folder = shutil.copytree(made(name)[0], tmp_path / "odd")
    values = json.loads((folder / "config.json").read_text()) | change
    values = {field: value for field, value in values.items() if change.get(field, ...) is not None}
    (folder / "config.json").write_text(json.dumps(values))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ours = Engine.load(folder, kv="bf16", device="cpu", max_context=512).logits(tokens(), 65)
    assert relative(ours, theirs(torch.tensor([tokens()])).logits[0]) < 1e-4


@pytest.mark.few("yarn")
@pytest.mark.parametrize("kind", ["yarn", "linear"])
@torch.inference_mode()
def test_contexts_beyond_the_files(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scaling that is added to a model as it stands: the file's context is left unasked, a longer one is exact."""
    scaling = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e5}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 128
    fields = {"hidden_size": 256, "max_position_embeddings": 128, "rope_parameters": scaling}
    theirs = written(tmp_path, "Qwen2", fields)(torch.tensor([tokens()])).logits[0]
    assert Engine.load(tmp_path, kv="bf16", device="cpu").max_context == 128
    engine = Engine.load(tmp_path, kv="bf16", device="cpu", max_context=512)
    assert relative(engine.logits(tokens(), 65), theirs) < 1e-4
    with pytest.raises(UsageError, match="beyond the model's: choose one of 512 tokens or less"):
        Engine.load(tmp_path, kv="bf16", device="cpu", max_context=513)
    assert main(["show", str(tmp_path)]) == 0
    assert "512 tokens at most, 128 unless --ctx asks for more" in capsys.readouterr().out


@pytest.mark.few("qwen3-yarn", "gemma4-small", "phi4-mini")
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_coded_keys_and_values_are_close(name: str, made: Callable[[str], tuple[Path, Any, Tensor]]) -> None:
    """With conditioned keys, whose means and matrices are measured on the model."""
    path, _, theirs = made(name)
    engine, ids = Engine.load(path, kv="oct4", device="cpu", max_context=512), tokens()
    assert engine.plan.conditioning == "full"
    ours = engine.logits(ids, 64)
    assert relative(ours[:128], theirs[:128]) < 1e-4, "before anything is coded"
    assert float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()) >= 0.97
    assert 0 < relative(ours, theirs) < 0.2


@pytest.mark.few("gemma4-small", "olmo2", "glm4")
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_transforms_change_nothing(name: str, made: Callable[[str], tuple[Path, Any, Tensor]]) -> None:
    """Rotations of keys and values, and conditioning of keys, are another basis alone."""
    path, _, theirs = made(name)
    cfg, ids = load_config(path), torch.tensor([tokens()])
    generator = torch.Generator().manual_seed(1)
    squares = {d: torch.randn(2, d, d, generator=generator, dtype=torch.float64) for _, d in cfg.cached_heads}
    turns = {d: torch.linalg.qr(square)[0] for d, square in squares.items()}
    of_keys, of_values = ([turns[d][side] for _, d in cfg.cached_heads] for side in (0, 1))
    decoder = Decoder(cfg, load_weights(path, cfg, "cpu", torch.float32), None, of_values, context=512)

    def logits() -> Tensor:
        positions = torch.arange(COUNT)[None]
        hidden = decoder.hidden(ids, positions, lambda i, q, k, v: attend_plain(q, k, v, decoder.specs[i].attention))
        return decoder.logits(hidden)[0]

    assert relative(logits(), theirs) < 5e-5
    decoder.store_keys(of_keys, conditioning.measure(decoder, ids[0].tolist()))
    assert relative(logits(), theirs) < 1e-4


@pytest.mark.few("llama3-biases", "gemma4-small", "cohere2")
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_packed_weights(name: str, made: Callable[[str], tuple[Path, Any, Tensor]]) -> None:
    """The engine computes with packed weights what plain PyTorch does; these are close to the dense ones."""
    path, _, theirs = made(name)
    engine, ids = Engine.load(path, kv="bf16", device="cpu", max_context=512, weights="int8"), tokens()
    decoder = engine._decoder
    hidden = decoder.hidden(
        torch.tensor([ids]), torch.arange(COUNT)[None],
        lambda i, q, k, v: attend_plain(q, k, v, decoder.specs[i].attention),
    )  # fmt: skip
    exact = decoder.logits(hidden)[0]
    assert relative(engine.logits(ids, 128), exact) < 5e-3  # activations are rounded, too
    assert 1e-5 < float((exact - theirs).norm() / theirs.norm()) < 0.1


@pytest.mark.few("gemma3", "phi4-mini")
@pytest.mark.parametrize("name", ["gemma3", "phi4-mini", "olmo2", "glm4", "cohere2"])
@torch.inference_mode()
def test_quantised_folders(name: str, made: Callable[[str], tuple[Path, Any, Tensor]], tmp_path: Path) -> None:
    """What is written holds rows, fused matrices and norms as the family's files do."""
    path, _, theirs = made(name)
    quantise(path, tmp_path / "out", "int8", device="cpu")
    ours = Engine.load(tmp_path / "out", kv="bf16", device="cpu", max_context=512).logits(tokens())
    assert 1e-5 < float((ours - theirs).norm() / theirs.norm()) < 0.05


@pytest.mark.parametrize("name", ["gemma4", "gemma4-small", "gemma4-alike"])
def test_what_gemma4_is_refused_for(
    name: str, made: Callable[[str], tuple[Path, Any, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where layers are taken to be of one kind: heads of several sizes, shared keys; and what ends each layer, which is
    there too if all heads are alike."""
    path = tmp_path / "alike" if name == "gemma4-alike" else made(name)[0]
    if name == "gemma4-alike":
        fields = {**heads(2, 1, 64), "global_head_dim": 64, "sliding_window": 64, "layer_types": TWO[:2]}
        more = {"hidden_size_per_layer_input": 0, "num_hidden_layers": 2}
        written(path, "Gemma4Text", {**fields, **more})
    capsys.readouterr()  # what transformers says of writing
    for command, words in (
        (
            ["bench", "-m", str(path), "--kv", "auto:60"],
            "auto measures layers that have heads of one size",
        ),
        (["eval", "codec", "-m", str(path)], "they cannot be compared: give another --model or --no-model"),
        (["quantize", str(path), str(tmp_path / "out")], "are not written: load the model with --weights instead"),
    ):
        assert main([*command, "--device", "cpu"] if command[0] != "eval" else command) in (1, 2)
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1 and said.startswith("octo-run: "), said


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.cpu() - exact).norm() / exact.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_families_on_a_gpu(name: str, make_checkpoint: Callable[..., Path]) -> None:
    """Against the CPU, in float32 and within the rounding of bfloat16; recorded steps, too. Without transformers."""
    kind, fields = MODELS[name]
    family = f"{kind.removesuffix('Text')}ForCausalLM"
    values = SMALL | {"rope_theta": None, "model_type": FAMILIES[family].model_type, "head_dim": None} | fields
    path, ids = make_checkpoint(architectures=[family], **values), tokens()
    exact = Engine.load(path, kv="bf16", device="cpu", dtype="float32", max_context=512).logits(ids)
    rounded = error(Engine.load(path, kv="bf16", device="cpu", dtype="bfloat16", max_context=512).logits(ids), exact)
    for dtype, bound in (("float32", 2e-3), ("bfloat16", 1.3 * rounded)):
        engine = Engine.load(path, kv="bf16", device=ON, dtype=dtype, max_context=512)
        for step in (None, 65):
            assert error(engine.logits(ids, step), exact) < bound, (dtype, step)
        assert error(stepped(engine, ids, 100), exact[100:]) < bound, dtype
    coded = Engine.load(path, kv="oct4", device="cpu", dtype="float32", max_context=512).logits(ids, 64)
    bound = 1.3 * math.hypot(rounded, error(coded, exact))  # of the code, and of rounding as above
    engine = Engine.load(path, kv="oct4", device=ON, dtype="bfloat16", max_context=512)
    assert error(engine.logits(ids, 64), exact) < bound
    assert error(stepped(engine, ids, 100), exact[100:]) < bound
