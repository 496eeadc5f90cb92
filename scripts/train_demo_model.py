"""Train a small chat model such as the embedded one, from plain text and dialogues, on one GPU in about ten minutes.

    python scripts/train_demo_model.py OUT --text books.txt reviews.txt --chat dialogues.jsonl [--heldout more.txt]

Text files are UTF-8, with `<|endoftext|>` between documents. A line of a chat file is one dialogue,
`{"messages": [{"role": "user", "content": "..."}, ...]}`, with the roles system, user and assistant. The model is only
as good as they are: the embedded one saw 125 million tokens of text and 4.5 million of dialogues.

What happens, in this order:

1. A SentencePiece BPE vocabulary is made from the texts, with the embedded model's settings (byte fallback, digits
   apart, spaces and line ends kept, ChatML marks as pieces 3 and 4).
2. Every batch has rows of three kinds, `--mix PLAIN CHAT NEEDLE`: windows of the text; dialogues in ChatML, one behind
   the other, two fifths with a system line; and texts with 1 to 5 hidden sentences "The special magic number for NAME
   is DIGITS." (a fifth: a phrase of two words) with questions about them. The loss of a hidden sentence does not count,
   that of an asked value counts four times. Half of the rows begin with `<s>`. Documents in a row see each other.
3. `--steps` steps with rows of `--context` tokens, then `--long-steps` with rows of twice as many, in batches of
   `--batch-tokens`: Muon for matrices, AdamW for the rest; linear warm-up, then a cosine to zero; gradients clipped to
   norm 1; float32 weights, bf16 autocast and torch.compile on CUDA, float32 on a CPU.
4. The checkpoint is written as the embedded one is: config.json, generation_config.json, safetensors shards with their
   index in bf16, tokenizer.model, tokenizer_config.json; and training.json, with the options, the files and the losses.
   It is written under another name and renamed when complete: a folder OUT is always a whole model.

The same options, files and versions draw the same rows in the same order from the same first weights (`--seed`); on a
GPU the last bits of sums differ between runs. Differences from the run that made the embedded model: that one held its
learning rate to 60 % of the time, then let it fall linearly, and replaced names and numbers in dialogues by random
ones.

To try it on a CPU in a minute:

    python scripts/train_demo_model.py /tmp/tiny --text books.txt --vocab 1000 --hidden 64 --layers 2 --heads 2 \\
        --kv-heads 1 --head-dim 32 --inner 128 --context 128 --batch-tokens 1024 --steps 100 --long-steps 0 --warmup 10
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_training.model import LanguageModel, Optimizers, schedule
from demo_training.rows import KINDS, Batch, Rows, row_counts
from demo_training.texts import (
    Corpus,
    encode_corpus,
    load_processor,
    read_chats,
    read_documents,
    train_tokenizer,
)  # fmt: skip
from model_folder import check_target, new_model_folder, write_json, write_weights
from torch import Tensor

from octo_run.engine.engine import choose_device
from octo_run.errors import OctoError, UsageError
from octo_run.models.cache import DEMO_PATH
from octo_run.models.config import CONFIG_NAME, GENERATION_CONFIG_NAME, ModelConfig, parse_config

Losses = Callable[[Tensor], Tensor]
_AHEAD = 3  # batches made while the device computes


@dataclass(frozen=True)
class Phase:
    """``steps`` steps with ``counts`` rows of each kind, of ``length`` tokens."""

    steps: int
    length: int
    counts: tuple[int, int, int]


def say(text: str) -> None:
    """A line of progress."""
    print(text, flush=True)


def make_config(args: argparse.Namespace) -> tuple[dict[str, Any], ModelConfig]:
    """The values of the checkpoint's config.json, the embedded model's but for the sizes, and what they mean."""
    values = json.loads((DEMO_PATH / CONFIG_NAME).read_text(encoding="utf-8"))
    values |= {
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "intermediate_size": args.inner,
        "max_position_embeddings": args.context * (2 if args.long_steps else 1),
    }
    return values, parse_config(values, Path("the options, as config.json"))


def phases(args: argparse.Namespace, has_chats: bool) -> list[Phase]:
    """The phases of a run.

    Raises:
        UsageError: A batch holds no row.
    """
    found = []
    for steps, length, mix in (
        (args.steps, args.context, args.mix),
        (args.long_steps, 2 * args.context, args.long_mix),
    ):
        if steps:
            rows = args.batch_tokens // length
            if not rows:
                raise UsageError(f"--batch-tokens {args.batch_tokens:,} is less than one row of {length:,} tokens.")
            found.append(Phase(steps, length, row_counts(rows, tuple(mix), has_chats)))
    return found


def read_corpus(args: argparse.Namespace) -> tuple[bytes, Corpus]:
    """Read the files, make the vocabulary, encode.

    Raises:
        UsageError: The files do not serve.
    """
    documents, chats = read_documents(args.text), read_chats(args.chat)
    say(f"{len(documents):,} documents, {sum(map(len, documents)):,} characters; {len(chats):,} dialogues")
    proto = train_tokenizer(documents, chats, args.vocab, args.seed)
    corpus = encode_corpus(load_processor(proto), documents, chats)
    say(f"{len(corpus.plain):,} tokens of text, {sum(map(len, corpus.chats)):,} of dialogues")
    longest = args.context * (2 if args.long_steps else 1)
    if len(corpus.plain) <= 2 * longest:
        raise UsageError(
            f"The text has {len(corpus.plain):,} tokens, and rows of {longest:,} need more than {2 * longest:,}: "
            "give more text or a smaller --context."
        )
    return proto, corpus


def batches(rows: Rows, plan: list[Phase]) -> Iterator[Batch]:
    """The batches of all phases in order, a few made ahead in a thread of their own."""
    with ThreadPoolExecutor(1) as worker:
        waiting: list[Future[Batch]] = []
        for phase in plan:
            for _ in range(phase.steps):
                waiting.append(worker.submit(rows.batch, phase.length, phase.counts))
                if len(waiting) > _AHEAD:
                    yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 on CUDA, nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def backward(losses: Losses, batch: Batch, device: torch.device, micro_tokens: int) -> Tensor:
    """Add the gradients of the weighted mean loss.

    Returns:
        Sums of weighted losses and of weights by kind, ``[2, kinds]``.
    """
    ids, weights = torch.from_numpy(batch.ids).to(device), torch.from_numpy(batch.weights).to(device)
    kinds = torch.from_numpy(batch.kinds).to(device)
    total = weights.sum()
    sums = torch.zeros(2, len(KINDS), device=device)
    size = max(1, micro_tokens // weights.shape[1])
    for first in range(0, len(ids), size):
        part = slice(first, first + size)
        with autocast(device):
            weighted = losses(ids[part]) * weights[part]
        (weighted.sum() / total).backward()  # type: ignore[no-untyped-call]
        sums[0].index_add_(0, kinds[part], weighted.detach().sum(1))
        sums[1].index_add_(0, kinds[part], weights[part].sum(1))
    return sums


def train(
    model: LanguageModel, losses: Losses, rows: Rows, plan: list[Phase], args: argparse.Namespace
) -> list[dict[str, float]]:
    """Train ``model``.

    Returns:
        The logged lines: step, mean loss of each kind since the last, tokens per second.

    Raises:
        OctoError: A loss is no longer finite.
    """
    device = next(model.parameters()).device
    optimizers = Optimizers(model, args.matrix_lr, args.lr)
    steps, log = sum(phase.steps for phase in plan), []
    sums, tokens, begun = torch.zeros(2, len(KINDS), device=device), 0, time.perf_counter()
    for step, batch in enumerate(batches(rows, plan)):
        sums += backward(losses, batch, device, args.micro_tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(schedule(step, steps, args.warmup))
        tokens += batch.weights.size
        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            means = (sums[0] / sums[1]).tolist()
            line = {kind: mean for kind, mean, weight in zip(KINDS, means, sums[1].tolist(), strict=True) if weight}
            if not all(abs(mean) < float("inf") for mean in line.values()):
                raise OctoError(f"The loss is not finite at step {step + 1}: lower --matrix-lr and --lr.")
            now = time.perf_counter()
            speed = tokens / (now - begun)
            shown = ", ".join(f"{kind} {mean:.4f}" for kind, mean in line.items())
            say(f"step {step + 1:,} of {steps:,}: {shown}; {speed:,.0f} tokens/s")
            log.append({"step": step + 1, **line, "tokens_per_s": speed})
            sums, tokens, begun = torch.zeros_like(sums), 0, now
    return log


@torch.inference_mode()
def heldout_loss(losses: Losses, ids: Tensor, length: int, device: torch.device) -> float:
    """Mean loss in nats over windows of ``length`` tokens of ``ids [n]`` (at most 128 of them)."""
    found = []
    for first in list(range(0, len(ids) - length, length))[:128]:
        with autocast(device):
            found.append(losses(ids[None, first : first + length + 1].to(device)).mean())
    return float(torch.stack(found).mean())


def write_checkpoint(
    out: Path, values: dict[str, Any], weights: dict[str, Tensor], proto: bytes, record: dict[str, Any]
) -> None:
    """Write the model folder ``out``, in the form of the embedded model's.

    Raises:
        OctoError: As :func:`new_model_folder`.
    """
    tokenizer = json.loads((DEMO_PATH / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["model_max_length"] = values["max_position_embeddings"]
    with new_model_folder(out) as folder:
        write_json(folder / CONFIG_NAME, values)
        (folder / GENERATION_CONFIG_NAME).write_bytes((DEMO_PATH / GENERATION_CONFIG_NAME).read_bytes())
        (folder / "tokenizer.model").write_bytes(proto)
        write_json(folder / "tokenizer_config.json", tokenizer)
        write_json(folder / "training.json", record)
        write_weights(folder, {name: tensor.to("cpu", torch.bfloat16) for name, tensor in weights.items()})


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options that are numbers of at least 1, with the embedded model's values."""
    for name, default, text in (
        ("vocab", 8192, "pieces of the vocabulary"),
        ("hidden", 384, "hidden size"),
        ("layers", 8, "layers"),
        ("heads", 6, "query heads"),
        ("kv-heads", 2, "KV heads"),
        ("head-dim", 128, "head dimension"),
        ("inner", 1024, "intermediate size of the MLP"),
        ("context", 2048, "tokens of a row"),
        ("steps", 2676, "steps with such rows"),
        ("batch-tokens", 262_144, "tokens of a batch"),
        ("micro-tokens", 65_536, "tokens that are computed at once: less needs less memory"),
        ("warmup", 100, "steps until the full learning rate"),
        ("log-every", 25, "steps between two lines of progress"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UsageError: A value is out of range.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="plain text")
    parser.add_argument("--chat", type=Path, nargs="+", default=[], metavar="FILE", help="dialogues, JSONL")
    parser.add_argument("--heldout", type=Path, metavar="FILE", help="text whose loss is printed at the end")
    add_sizes(parser)
    sizes = [name for name, value in vars(parser.parse_args(["x", "--text", "x"])).items() if isinstance(value, int)]
    parser.add_argument("--long-steps", type=int, default=597, help="steps with rows twice as long (default: 597)")
    for name, default in (("mix", [101.0, 13.0, 14.0]), ("long-mix", [28.0, 16.0, 20.0])):
        text = f"shares of rows (default: {' '.join(f'{share:g}' for share in default)})"
        kinds = ("PLAIN", "CHAT", "NEEDLE")
        parser.add_argument(f"--{name}", type=float, nargs=3, default=default, metavar=kinds, help=text)
    parser.add_argument("--matrix-lr", type=float, default=0.02, help="peak learning rate of Muon (default: 0.02)")
    parser.add_argument("--lr", type=float, default=0.002, help="peak learning rate of AdamW (default: 0.002)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and rows (default: 0)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--no-compile", action="store_true", help="on CUDA: no torch.compile")
    args = parser.parse_args(argv)
    for name in sizes:
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1.")
    if args.vocab > 65_536 or args.long_steps < 0 or args.seed < 0:
        raise UsageError("Give a --vocab of at most 65536, and --long-steps and --seed of at least 0.")
    if min(args.matrix_lr, args.lr) <= 0:
        raise UsageError("Give a --matrix-lr and --lr above 0.")
    for mix in (args.mix, args.long_mix):
        if min(mix) < 0 or mix[0] == 0:
            raise UsageError("--mix and --long-mix are three shares of at least 0, the first above 0.")
    return args


def run(args: argparse.Namespace) -> None:
    """Do what the module's description says."""
    check_target(args.out)
    device = choose_device(args.device)
    values, cfg = make_config(args)
    plan = phases(args, bool(args.chat))
    heldout_texts = read_documents([args.heldout]) if args.heldout else []
    proto, corpus = read_corpus(args)
    heldout = encode_corpus(corpus.processor, heldout_texts, []).plain
    if args.heldout and len(heldout) <= args.context:
        raise UsageError(f"{args.heldout} has {len(heldout):,} tokens; give more than --context {args.context:,}.")
    torch.manual_seed(args.seed)
    model = LanguageModel(cfg).to(device)
    losses: Losses = torch.compile(model) if device.type == "cuda" and not args.no_compile else model
    begun = time.perf_counter()
    log = train(model, losses, Rows(corpus, args.seed), plan, args)
    record: dict[str, Any] = {"options": {key: _plain(value) for key, value in vars(args).items() if key != "out"}}
    record |= {"torch": torch.__version__, "tokens": sum(p.steps * p.length * sum(p.counts) for p in plan)}
    record |= {"text_tokens": len(corpus.plain), "chat_tokens": sum(map(len, corpus.chats))}
    record |= {"seconds": round(time.perf_counter() - begun, 1), "log": log}
    if args.heldout:
        record["heldout_loss"] = heldout_loss(model, torch.from_numpy(heldout.astype("int64")), args.context, device)
        say(f"held-out loss {record['heldout_loss']:.4f}")
    write_checkpoint(args.out, values, model.state_dict(), proto, record)
    say(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, trained in {record['seconds']} s")


def _plain(value: Any) -> Any:
    """An option's value as JSON has it."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code (1: failed, 2: wrong usage), after one sentence on standard error."""
    try:
        run(parse_arguments(argv))
    except OctoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except torch.cuda.OutOfMemoryError:
        print("error: The GPU has not enough memory for this: give a smaller --micro-tokens.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
