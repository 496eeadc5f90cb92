"""Perplexity of llama.cpp with its own KV formats, on the windows of `scripts/report_quality.py`, as a part for it.

    python scripts/quality_llama.py OUT.json --model NAME=MODEL --gguf FILE --text FILE [--kv f16,q8_0,q4_0]

FILE has MODEL's weights in f16 (`scripts/write_gguf.py`) and is read by llama-cpp-python; with weights of 4 bits its
products round their inputs, and small differences drown in that. Token ids and windows are octo-run's, so rows stand
beside those of `octo-run eval ppl`. The change is against llama.cpp's own f16 cache. Its caches code every token at
once: no sinks and no window stay uncoded. OUT.json has what is done after every window.
"""

import argparse
import dataclasses
import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import llama_peer
import torch
from bench_report import cpu_name

from octo_run.engine.evaluation import perplexity
from octo_run.models.config import load_config
from octo_run.models.hub import resolve
from octo_run.tokenizer import load_tokenizer

#: Bytes of a number, by llama.cpp's name of a format: blocks of 32 numbers share a factor in fp16.
BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32}
SLICE = 256  # tokens whose distributions are compared at a time


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Float32 logits ``[n, vocab]`` behind each of the tokens."""
    model.reset()
    llama_cpp.llama_cpp.llama_memory_clear(llama_cpp.llama_cpp.llama_get_memory(model._ctx.ctx), True)
    model.eval(ids)
    return torch.from_numpy(model.scores[: len(ids)])


def compare(exact: torch.Tensor, coded: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses, divergences from ``exact`` and agreement with it, ``[3, n]``, of logits ``[n, vocab]``."""
    parts = []
    for first in range(0, len(targets), SLICE):
        rows = slice(first, first + SLICE)
        wanted, found = exact[rows].log_softmax(-1), coded[rows].log_softmax(-1)
        loss = -found.gather(1, targets[rows, None])[:, 0]
        divergence = (wanted.exp() * (wanted - found)).sum(-1)
        parts.append(torch.stack((loss, divergence, (wanted.argmax(-1) == found.argmax(-1)).float())))
    return torch.cat(parts, 1)


def measure(args: argparse.Namespace) -> None:
    """Read all windows with all formats, and write the part after each of them."""
    name, folder = args.model.split("=", 1)
    path = resolve(folder)
    cfg, tokenizer = load_config(path), load_tokenizer(path)
    ids = tokenizer.encode(args.text.read_text("utf-8")[args.skip : args.skip + 8 * args.tokens])[: args.tokens]
    windows = perplexity.windows(len(ids), args.ctx, args.stride, begin=tokenizer.adds_bos)
    kvs = ["f16", *(kv for kv in args.kv.split(",") if kv != "f16")]
    options = {"context": args.ctx, "threads": args.threads, "logits_all": True, "flash_attn": True}
    models = {kv: llama_peer.load(args.gguf, kv=kv, **options) for kv in kvs}
    command = f"python scripts/quality_llama.py {shlex.join(sys.argv[1:])}"
    part: dict[str, Any] = {"kind": "ppl", "model": name, "text": args.text.name, "skip": args.skip}
    part |= {"tokens": args.tokens, "context": args.ctx, "stride": args.stride, "head_dim": cfg.head_dim}
    part["where"] = (
        f"llama-cpp-python {llama_cpp.__version__}, {cpu_name(args.threads)}, {datetime.date.today()}; `{command}`"
    )
    numbers = 2 * len(cfg.attention_layers) * cfg.num_kv_heads * cfg.head_dim
    done: list[torch.Tensor] = []
    for window in windows:
        text = perplexity.window_ids(tokenizer, ids, window)
        scored = window.end - window.first
        targets = torch.tensor(text[-scored:])
        exact = logits(models["f16"], text[:-1])[-scored:]
        done.append(torch.stack([
            compare(exact, exact if kv == "f16" else logits(model, text[:-1])[-scored:], targets)
            for kv, model in models.items()
        ]))  # fmt: skip
        values = torch.cat(done, 2).to(torch.float64)
        partial = len(done) < len(windows)
        rows = [
            perplexity.row(f"llama.cpp {kv}", values[0, 0], own, numbers * BYTES[kv], 0.0, partial)
            for kv, own in zip(kvs, values, strict=True)
        ]
        part["rows"] = [{"group": "llama", "number_bytes": BYTES[row.kv.split()[1]], **dataclasses.asdict(row)}
                        for row in rows]  # fmt: skip
        args.out.write_text(json.dumps(part, indent=1))
        print(f"{len(done)} of {len(windows)} windows:", *(f"{row.kv} {row.delta_percent:+.3f} %" for row in rows),
              flush=True)  # fmt: skip


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, help="NAME=MODEL")
    parser.add_argument("--gguf", type=Path, required=True, help="of the same weights, in f16")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=0, help="characters of the text to pass over")
    parser.add_argument("--tokens", type=int, default=24_570)
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=2047)
    parser.add_argument("--kv", default="f16,q8_0,q4_0")
    parser.add_argument("--threads", type=int, default=1)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
