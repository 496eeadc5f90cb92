"""Make a model whose keys are hard to code, and which says what the model it is made from says.

    python scripts/make_stress_model.py OUT [--model octo-demo] [--check TEXT_FILE]

Two things that real models have and the demonstration model has not are put into its query and key projections:

* Outlier channels. In each layer and KV head, `--outlier-pairs` rotating pairs (channels i and i + d/2), drawn with
  `--seed`, are multiplied by `--outlier-scale` in the keys and divided by it in the queries of that head. RoPE turns
  the two channels of a pair into each other, so both are scaled alike and no product q . k changes; with a power of
  two no rounding does either.
* A bias of the keys as large as Qwen2.5's: `--bias-energy` times what the head's keys have without it, |mu|^2 against
  the mean of |k|^2 over a text. It lies in the `--bias-pairs` slowest pairs, where RoPE hardly turns it within a
  context, so that all logits of a head move nearly alike, which the softmax does not see. Within a pair it points along
  the principal axis of the queries there: what RoPE adds to a logit at first order is the query's other component.

The result has the configuration of the model with `attention_bias: true` (the other biases are zero), its tokenizer
files, and safetensors shards. A table of both figures for each head is printed; `--check` adds the perplexity of
both models on a text, with an uncompressed cache.
"""

import argparse
import math
import shutil
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from model_folder import check_target, new_model_folder, write_json, write_weights
from torch import Tensor

from octo_run import Engine
from octo_run.errors import OctoError, UsageError
from octo_run.models import rope
from octo_run.models.config import CONFIG_NAME, ModelConfig, parse_config
from octo_run.models.decoder import Decoder
from octo_run.models.files import INDEX_NAME, SMALL_NAMES
from octo_run.models.foreign import read_json_object
from octo_run.models.hub import resolve
from octo_run.models.tensors import expected_tensors
from octo_run.models.weights import load_weights
from octo_run.tokenizer import Tokenizer, load_tokenizer

Weights = dict[str, Tensor]
LEAST_TOKENS = 256


@dataclass(frozen=True)
class HeadFigures:
    """Figures of one KV head.

    Attributes:
        outliers_before: Largest channel RMS of the keys to the median, before the change.
        outliers_after: The same after it.
        bias_energy: The bias's energy to the rest's.
    """

    layer: int
    head: int
    outliers_before: float
    outliers_after: float
    bias_energy: float


def pair_channels(pair: Tensor, head_dim: int) -> Tensor:
    """Both channels of each pair: int64 ``[2 n]`` of ``[n]``, first halves first."""
    return torch.cat([pair, pair + head_dim // 2])


def scale_pairs(weights: Weights, cfg: ModelConfig, pairs: Tensor, scale: float) -> None:
    """Multiply ``pairs [layers, kv_heads, n]`` by ``scale`` in keys, divide in queries, in place; biases too."""
    group = cfg.num_heads // cfg.num_kv_heads
    for layer in range(cfg.num_layers):
        for kind in ("weight", "bias"):
            prefix = f"model.layers.{layer}.self_attn."
            q = weights[f"{prefix}q_proj.{kind}"].view(cfg.num_kv_heads, group, cfg.head_dim, -1)
            k = weights[f"{prefix}k_proj.{kind}"].view(cfg.num_kv_heads, cfg.head_dim, -1)
            for head in range(cfg.num_kv_heads):
                channels = pair_channels(pairs[layer, head], cfg.head_dim)
                k[head, channels] *= scale
                q[head, :, channels] /= scale


@torch.inference_mode()
def queries_and_keys(weights: Weights, cfg: ModelConfig, ids: list[int]) -> tuple[Tensor, Tensor]:
    """What a text gives before RoPE: float32 ``[layers, n, heads, d]`` and ``[layers, n, kv_heads, d]``."""
    decoder = Decoder(cfg, dict(weights), None, None)
    positions = torch.arange(len(ids))[None]
    cos, sin = rope.cos_sin(positions, decoder.inv_freq(0), torch.float32)
    queries, keys = [], []

    def attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries.append(rope.apply(q, cos, -sin)[0])
        keys.append(rope.apply(k, cos, -sin)[0])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    decoder.hidden(torch.tensor([ids]), positions, attention)
    return torch.stack(queries), torch.stack(keys)


def biases(queries: Tensor, keys: Tensor, pairs: int, energy: float) -> Tensor:
    """The bias of each KV head, float32 ``[layers, kv_heads, d]``, in the last ``pairs`` pairs, the same in each."""
    layers, _, kv_heads, dim = keys.shape
    size = (energy * keys.square().sum(-1).mean(1) / pairs).sqrt()  # [layers, kv_heads], of one pair
    grouped = queries.reshape(layers, queries.shape[1], kv_heads, -1, 2, dim // 2)[..., dim // 2 - pairs :]
    moments = torch.einsum("lnhgap,lnhgbp->lhpab", grouped, grouped)
    axis = torch.linalg.eigh(moments).eigenvectors[..., -1]  # [layers, kv_heads, pairs, 2]
    means = grouped.mean((1, 3)).transpose(-1, -2)
    axis = torch.where((axis * means).sum(-1, keepdim=True) < 0, -axis, axis)  # eigenvectors have no sign of their own
    mu = torch.zeros(layers, kv_heads, 2, dim // 2)
    mu[..., dim // 2 - pairs :] = (axis * size[..., None, None]).transpose(-1, -2)
    return mu.flatten(2)


def outlier_ratio(keys: Tensor) -> Tensor:
    """Largest RMS of a channel to the median one: ``[layers, kv_heads]`` of ``[layers, n, kv_heads, d]``."""
    rms = keys.square().mean(1).sqrt()
    return rms.amax(-1) / rms.median(-1).values


def stress(
    weights: Weights, cfg: ModelConfig, ids: list[int], *,
    outlier_pairs: int, outlier_scale: float, bias_pairs: int, bias_energy: float, seed: int,
) -> list[HeadFigures]:  # fmt: skip
    """Put outliers and biases into float32 ``weights`` (which have all biases), in place.

    Returns:
        The figures of each head.
    """
    shape = (cfg.num_layers, cfg.num_kv_heads)
    before = outlier_ratio(queries_and_keys(weights, cfg, ids)[1])
    fast = cfg.head_dim // 2 - bias_pairs
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(*shape, fast, generator=generator).argsort(-1)
    scale_pairs(weights, cfg, order[..., :outlier_pairs], outlier_scale)
    queries, keys = queries_and_keys(weights, cfg, ids)
    mu = biases(queries, keys, bias_pairs, bias_energy)
    for layer in range(cfg.num_layers):
        weights[f"model.layers.{layer}.self_attn.k_proj.bias"] += mu[layer].flatten()
    after = outlier_ratio(keys)
    ratio = mu.square().sum(-1) / keys.square().sum(-1).mean(1)
    return [
        HeadFigures(layer, head, float(before[layer, head]), float(after[layer, head]), float(ratio[layer, head]))
        for layer in range(cfg.num_layers)
        for head in range(cfg.num_kv_heads)
    ]


def with_biases(source: Path) -> tuple[dict[str, object], ModelConfig, Weights]:
    """A model with all biases.

    Returns:
        The configuration file's values with ``attention_bias``, what they mean, and float32 weights with all biases.

    Raises:
        OctoError: The model has no such field.
    """
    values = read_json_object(source / CONFIG_NAME)
    old = parse_config(values, source / CONFIG_NAME)
    if old.architecture != "LlamaForCausalLM":
        raise OctoError(f"{source} is a {old.architecture}; a stress model is made from a LlamaForCausalLM.")
    weights = load_weights(source, old, "cpu", torch.float32)
    values["attention_bias"] = True
    cfg = parse_config(values, source / CONFIG_NAME)
    return values, cfg, {n: weights[n] if n in weights else torch.zeros(s) for n, s in expected_tensors(cfg).items()}


def text_ids(tokenizer: Tokenizer, text: str, limit: int, name: str) -> list[int]:
    """The first ``limit`` ids of a text, after the begin-of-text token.

    Raises:
        UsageError: The text is too short.
    """
    ids = tokenizer.prompt(text[: 16 * limit])[:limit]
    if len(ids) < LEAST_TOKENS:
        raise UsageError(f"{name} has {len(ids)} tokens; give a text of at least {LEAST_TOKENS}.")
    return ids


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        UsageError: The file cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start:,}): convert it first.") from None


def losses(model: Path, windows: list[list[int]], context: int, dtype: str) -> Tensor:
    """Losses in nats of the tokens of ``windows`` but the first of each, through an uncompressed cache."""
    engine = Engine.load(model, kv="bf16", dtype=dtype, max_context=context)
    parts = []
    for ids in windows:
        logits = engine.logits(ids[:-1])
        parts.append(F.cross_entropy(logits, torch.tensor(ids[1:], device=logits.device), reduction="none").cpu())
    return torch.cat(parts).double()


def check(source: Path, target: Path, text: Path, tokens: int, context: int, dtype: str) -> None:
    """Print the perplexities of both models on a text, in windows of ``context`` tokens, and their difference."""
    tokenizer = load_tokenizer(source)
    begin = tokenizer.opening
    ids = text_ids(tokenizer, read_text(text), tokens, str(text))
    room = context - len(begin)
    windows = [begin + ids[i : i + room] for i in range(len(begin), len(ids) - 1, room)]
    windows = [window for window in windows if len(window) > 1]
    base, ours = (losses(model, windows, context, dtype) for model in (source, target))
    change = ours - base
    error = float(change.std()) / math.sqrt(len(change))
    print(
        f"perplexity, {len(base):,} tokens of {text.name}, windows of {context:,}, {dtype}: "
        f"{math.exp(base.mean()):.4f} -> {math.exp(ours.mean()):.4f} "
        f"({100 * math.expm1(change.mean()):+.3f} %, standard error {100 * error:.3f} %)"
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UsageError: A value is out of range.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--model", default="octo-demo", help="folder or name of a Llama model (default: octo-demo)")
    parser.add_argument("--text", type=Path, help="text on which keys are measured (default: the bundled sample)")
    parser.add_argument("--outlier-pairs", type=int, default=2, help="scaled pairs of each KV head (default: 2)")
    parser.add_argument("--outlier-scale", type=float, default=8.0, help="their factor, a power of two (default: 8)")
    parser.add_argument("--bias-pairs", type=int, default=4, help="slowest pairs with a bias (default: 4)")
    parser.add_argument("--bias-energy", type=float, default=16.0, help="times the other key energy (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pairs (default: 0)")
    parser.add_argument("--check", type=Path, metavar="TEXT_FILE", help="compare the perplexities of both models")
    parser.add_argument("--check-tokens", type=int, default=20_480, help="tokens of that text (default: 20480)")
    parser.add_argument("--check-context", type=int, default=2048, help="tokens of a window (default: 2048)")
    parser.add_argument("--check-dtype", default="float32", help="dtype of the arithmetic (default: float32)")
    args = parser.parse_args(argv)
    scale, energy = args.outlier_scale, args.bias_energy
    if not 1 <= scale <= 2**15 or math.frexp(scale)[0] != 0.5:
        raise UsageError(f"--outlier-scale is {scale:g}; give a power of two from 1 to 32768, which rounds nothing.")
    if not 0 <= energy <= 1e6:
        raise UsageError(f"--bias-energy is {energy:g}; give 0 to 1000000.")
    return args


def make(args: argparse.Namespace) -> None:
    """Make the model that the arguments describe."""
    check_target(args.out)
    source = resolve(args.model)
    values, cfg, weights = with_biases(source)
    if args.bias_pairs < 1 or args.outlier_pairs < 0 or args.bias_pairs + args.outlier_pairs > cfg.head_dim // 2:
        raise UsageError(
            f"--bias-pairs {args.bias_pairs} and --outlier-pairs {args.outlier_pairs} do not fit: "
            f"a head has {cfg.head_dim // 2} pairs, and at least one gets a bias."
        )
    sample = files("octo_run.engine.evaluation") / "sample.txt"
    text = read_text(args.text) if args.text else sample.read_text(encoding="utf-8")
    ids = text_ids(load_tokenizer(source), text, min(2048, cfg.max_position_embeddings), "The text")
    figures = stress(
        weights, cfg, ids, outlier_pairs=args.outlier_pairs, outlier_scale=args.outlier_scale,
        bias_pairs=args.bias_pairs, bias_energy=args.bias_energy, seed=args.seed,
    )  # fmt: skip
    with new_model_folder(args.out) as folder:
        for name in SMALL_NAMES:
            if name not in (CONFIG_NAME, INDEX_NAME) and (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        write_json(folder / CONFIG_NAME, values)
        dtype = getattr(torch, cfg.dtype)
        write_weights(folder, {name: tensor.to(dtype) for name, tensor in weights.items()})
    print("layer  KV head  largest channel / median: before   after  bias energy / rest")
    for row in figures:
        outliers = f"{row.outliers_before:32.1f} {row.outliers_after:7.1f}"
        print(f"{row.layer:5}  {row.head:7}  {outliers}  {row.bias_energy:18.1f}")
    print(f"{args.out}: made from {source}")
    if args.check is not None:
        check(source, args.out, args.check, args.check_tokens, args.check_context, args.check_dtype)


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code (1: failed, 2: wrong usage), after one sentence on standard error."""
    try:
        make(parse_arguments(argv))
    except OctoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
