"""The kinds of file: how their mutants are made, and the reader that must take or refuse each."""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fuzzing import corpora, gguf_mutants, hostile, protobuf_mutants, safetensors_mutants, template_mutants
from fuzzing.corpora import Seed
from fuzzing.json_mutants import Document, words_of
from octo_run.errors import OctoError


class Wrong(Exception):
    """A wrong result of a reader.

    Details that differ in quoted texts, paths and numbers alone count as the same fault.

    Attributes:
        what: The name of the kind of wrong result.
    """

    def __init__(self, what: str, detail: str) -> None:
        super().__init__(detail)
        self.what = what


class Trial:
    """One mutant before its reader.

    Args:
        limit: The CPU seconds after which SIGPROF ends the process, for each step.

    Attributes:
        refusals: What was refused.
        aside: Refusals that say nothing about the file (their sentences count all the same).
        notes: Listed differences from another reader.
        slowest: The CPU seconds of the slowest step.
    """

    def __init__(self, limit: float = 0.0) -> None:
        self.refusals: list[OctoError] = []
        self.aside: list[OctoError] = []
        self.notes: list[str] = []
        self.slowest = 0.0
        self._limit, self._since = limit, time.process_time()

    @contextmanager
    def step(self, *, aside: bool = False) -> Iterator[None]:
        """A part of the check, one thing that a user waits for. After its refusal the next one begins."""
        self._lap(self._limit)
        try:
            yield
        except OctoError as error:
            (self.aside if aside else self.refusals).append(error)
        finally:
            self._lap(self._limit)

    def end(self) -> None:
        """No more steps: the timer stops."""
        self._lap(0.0)

    def _lap(self, limit: float) -> None:
        signal.setitimer(signal.ITIMER_PROF, limit)
        now = time.process_time()
        self.slowest, self._since = max(self.slowest, now - self._since), now


#: What may stand in a file's place: no regular file, or one that is too large to read.
NODES = ("missing", "folder", "pipe", "endless device", "loop of links", "10 GB of zeros")


@dataclass(frozen=True)
class Mutant:
    """A mutant of the seed with this number: the content of its target file, or what stands there instead of a file."""

    seed: int
    file: str
    data: bytes
    node: str = ""

    def write(self, folder: Path) -> None:
        """Put the mutant in the place of what is there."""
        path = folder / self.file
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        if self.node == "folder":
            path.mkdir()
        elif self.node == "pipe":
            os.mkfifo(path)
        elif self.node in ("endless device", "loop of links"):
            path.symlink_to("/dev/zero" if self.node == "endless device" else path)
        elif self.node != "missing":
            path.write_bytes(self.data)
            if self.node:
                os.truncate(path, 10 * 10**9)


Mutate = Callable[[random.Random, Seed], bytes]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        mutator: Gives, for seeds, what makes the content of a mutant of one of them.
        check: Reads a folder with the file and raises what the reader raises, or ``Wrong``.
        compare: Holds the reader against another (not timed).
    """

    name: str
    seeds: list[Seed]
    mutator: Callable[[list[Seed]], Mutate]
    check: Callable[[Path, Trial], None]
    compare: Callable[[Path, Trial], None] = field(default=lambda _folder, _trial: None)

    @cached_property
    def _mutators(self) -> tuple[tuple[list[Seed], Mutate], ...]:
        """Seeds with their mutator: those written for the fuzzer, and all."""
        pools = ([seed for seed in self.seeds if not seed.real], self.seeds)
        return tuple((pool, self.mutator(pool)) for pool in pools)

    def mutant(self, number: int) -> Mutant:
        """The mutant with this number: the same wherever and whenever it is made.

        Every fourth may come from real files, if there are any, and then is the same for the same ones only.
        """
        pool, mutate = self._mutators[number % 4 == 3]
        rng = random.Random(f"{self.name}:{number}")
        index = rng.choices(range(len(pool)), [seed.weight for seed in pool])[0]
        if rng.random() < 0.002:
            return Mutant(index, pool[index].target, b"", rng.choice(NODES))
        return Mutant(index, pool[index].target, mutate(rng, pool[index]))

    def lay_out(self, folder: Path, index: int) -> None:
        """Write the seed with this number, and what stands beside it, into ``folder``."""
        seed = self.seeds[index]
        for name, data in {**seed.beside, seed.target: seed.data}.items():
            (folder / name).write_bytes(data)


def _json_mutator(seeds: list[Seed], parts: Sequence[Any] = ()) -> Mutate:
    donors = [json.loads(seed.data) for seed in seeds if seed.data.startswith(b"{")]
    words = words_of([*donors, *parts])
    everything = [seed.data for seed in seeds]
    trees = [*parts, *donors]

    def mutate(rng: random.Random, seed: Seed) -> bytes:
        if rng.random() < 0.05 or not seed.data.startswith(b"{"):
            return hostile.damage(rng, seed.data, everything)
        doc = Document(rng, seed.data, trees, words)
        doc.change()
        data = doc.data()
        return hostile.damage(rng, data, everything) if rng.random() < 0.03 else data

    return mutate


def _safetensors_mutator(seeds: list[Seed]) -> Mutate:
    files = [seed for seed in seeds if seed.target.endswith(".safetensors")]
    donors = [json.loads(safetensors_mutants.split(seed.data)[0]) for seed in files]
    words = [*words_of(donors), *safetensors_mutants.DTYPES]
    others = [seed.data for seed in files]
    index = _json_mutator([seed for seed in seeds if seed not in files])

    def mutate(rng: random.Random, seed: Seed) -> bytes:
        if seed.target.endswith(".json"):
            return index(rng, seed)
        return safetensors_mutants.mutate(rng, seed.data, donors, words, others)

    return mutate


def _protobuf_mutator(seeds: list[Seed]) -> Mutate:
    others = [seed.data for seed in seeds]
    return lambda rng, seed: protobuf_mutants.mutate(rng, seed.data, others)


def _template_mutator(seeds: list[Seed]) -> Mutate:
    others = [seed.data.decode() for seed in seeds]
    return lambda rng, seed: template_mutants.mutate(rng, seed.data.decode(), others).encode("utf-8", "surrogatepass")


def _safetensors(data: Path | None) -> Kind:
    from fuzzing.safetensors_check import check, compare

    return Kind("safetensors", corpora.weights(data), _safetensors_mutator, check, compare)


def _config(data: Path | None) -> Kind:
    import torch

    from octo_run.engine import Engine
    from octo_run.engine.plan import plan_memory
    from octo_run.models.config import load_config
    from octo_run.models.tensors import num_parameters

    def check(folder: Path, trial: Trial) -> None:
        cfg = load_config(folder)
        sizes = (cfg.vocab_size, cfg.hidden_size, cfg.intermediate_size, cfg.num_heads, cfg.head_dim, cfg.num_layers)
        with trial.step(aside=True):  # whether a model fits depends on the machine
            plan_memory(cfg, "oct3", device=torch.device("cpu"), dtype=torch.float32)
        if max(sizes) > 256 or num_parameters(cfg) > 300_000:
            return
        context = min(8, cfg.max_position_embeddings, cfg.sliding_window or 8)
        engine = Engine.load("fuzzed", random_weights=cfg, kv="bf16", device="cpu", dtype="fp32", max_context=context)
        logits = engine.logits([i % cfg.vocab_size for i in range(min(5, context))])
        if not bool(logits.isfinite().all()):
            raise Wrong("logits that are not finite", f"{cfg}")
        if cfg.vocab_size > 1 and cfg.hidden_size > 1 and bool((logits == logits[:, :1]).all()):
            raise Wrong("logits that are all equal", f"{cfg}")

    return Kind("config", corpora.configs(data), _json_mutator, check)


def _generation_config(data: Path | None) -> Kind:
    import torch

    from octo_run.engine.sampling import BatchSampler, SamplingParams
    from octo_run.models.config import load_generation_defaults

    vocab, cpu = 32, torch.device("cpu")
    logits, prompt = torch.linspace(-8.0, 8.0, vocab), [1, 16, vocab - 1]  # of either sign, and the largest

    def check(folder: Path, _trial: Trial) -> None:
        params = SamplingParams.from_defaults(load_generation_defaults(folder), seed=1)
        sampler = BatchSampler(1, vocab, cpu)
        sampler.arrange([sampler.enter(0, params, prompt)])
        sampler.draw(logits[None], torch.zeros(1, dtype=torch.int32))
        drawn, value = int(sampler.tokens[0]), float(sampler.drawn[1].view(torch.float32)[0])
        if not (0 <= drawn < vocab and -1e30 < value <= 0):
            raise Wrong("a draw out of range", f"token {drawn}, log-probability {value}, {params}")

    return Kind("generation_config", corpora.generation_configs(data), _json_mutator, check)


TEXTS = (
    "Hello world, hello the world",
    "",
    "  leading and trailing \n",
    "Äpfel, 你好, 🙂‍↔️ e\u0301, \u202e\u2028",
    "<s>[INST] </s><unk><|im_end|><|end|><think> <0x41> ▁",
    "\x00\x1b[31m\t\r\n",
    "1234567890 3.14 0x7f",
    "a" * 60 + "!",
    "the world " * 100,
)
CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is <|im_end|> and </s>? " + "Tell me. " * 20},
        {"role": "assistant", "content": "<think>\nhm\n</think>\nA token."},
        {"role": "user", "content": "\x1b[31mThanks\u202e {{ 7 * 7 }}"},
    ],
)
_INSIDE = re.compile(r"<[^<>]{1,80} at 0x[0-9a-f]{6,}>|<class '[\w.]+'>")


def _chat(tokenizer: Any, trial: Trial) -> None:
    for conversation in (*CONVERSATIONS, []):
        if trial.slowest > 1.0:
            return  # a template that reaches its limits: the others would take as long
        with trial.step(aside=not conversation):
            ids = tokenizer.chat(conversation)
            if not all(isinstance(i, int) and i >= 0 for i in ids):
                raise Wrong("ids that are none", f"{ids[:20]}")
        with trial.step(aside=not conversation):
            text = tokenizer.render(conversation)
            found = _INSIDE.search(text)
            if found is not None:
                raise Wrong("an object's inside in the text", found.group())


def _read_tokenizer(folder: Path, trial: Trial) -> None:
    from octo_run.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        with trial.step():
            ids = tokenizer.encode(text, add_bos=True)
            if not all(0 <= i < tokenizer.vocab_size for i in ids):
                raise Wrong("an id beyond the vocabulary", f"{ids[:20]} of {tokenizer.vocab_size}")
            spelled = tokenizer.special_ids.intersection(ids[1:]) - {tokenizer.unk_id}
            if spelled:
                raise Wrong("a special token from text", f"id {min(spelled)} for {text[:20]!r}")
            tokenizer.decode(ids)
        with trial.step():
            tokenizer.encode(text, allow_special=True)
    last = tokenizer.vocab_size
    tokenizer.decode([0, 1, 2, last // 2, last - 1, last, last + 1_000], skip_special=False)
    if tokenizer.has_chat_template:
        _chat(tokenizer, trial)


def _read_template(folder: Path, trial: Trial) -> None:
    from octo_run.tokenizer import load_tokenizer

    _chat(load_tokenizer(folder), trial)


def _tokenizer_config(data: Path | None) -> Kind:
    return Kind("tokenizer_config", corpora.tokenizer_configs(data), _json_mutator, _read_tokenizer)


def _tokenizer_json(data: Path | None) -> Kind:
    mutator = partial(_json_mutator, parts=corpora.PARTS)
    return Kind("tokenizer_json", corpora.tokenizer_jsons(data), mutator, _read_tokenizer)


def _tokenizer_model(data: Path | None) -> Kind:
    return Kind("tokenizer_model", corpora.sentencepieces(data), _protobuf_mutator, _read_tokenizer)


def _gguf(data: Path | None) -> Kind:
    import torch

    from octo_run.models.config import load_config
    from octo_run.models.gguf.importer import import_model
    from octo_run.models.weights import load_weights

    def check(folder: Path, _trial: Trial) -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        os.environ["OCTO_RUN_CACHE"] = str(folder / "cache")
        entry = import_model(folder / "model.gguf")
        weights = load_weights(entry.path, load_config(entry.path), "cpu", torch.float32)
        if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            raise Wrong("weights that are not finite", entry.label)

    def mutator(seeds: list[Seed]) -> Mutate:
        others = [seed.data for seed in seeds]
        return lambda rng, seed: gguf_mutants.mutate(rng, seed.data, others)

    return Kind("gguf", corpora.ggufs(data), mutator, check)


def _template(data: Path | None) -> Kind:
    return Kind("template", corpora.templates(data), _template_mutator, _read_template)


#: Name -> what makes the kind, given the folder of real files or None. They import what their readers need.
KINDS: dict[str, Callable[[Path | None], Kind]] = {
    "safetensors": _safetensors,
    "gguf": _gguf,
    "config": _config,
    "generation_config": _generation_config,
    "tokenizer_config": _tokenizer_config,
    "tokenizer_json": _tokenizer_json,
    "tokenizer_model": _tokenizer_model,
    "template": _template,
}
