"""Choosing the next token from logits."""

import math
import secrets
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from octo_run.errors import OctoError, UsageError
from octo_run.models.config import GenerationDefaults


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and ``repetition_penalty`` 1 switch the
    respective rule off. The rules apply in the order repetition penalty (over prompt and answer), temperature, top-k,
    top-p, min-p. ``seed`` None takes a fresh seed. ``max_tokens`` None means as many as the context holds. Generation
    ends at one of ``stop_ids`` (in addition to the model's own end tokens) or where the text holds one of the strings
    ``stop``. Raises ``UsageError`` for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks = {
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p < 1, "at least 0 (off) and below 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 (1 is off)"),
            "seed": (self.seed is None or 0 <= self.seed < 2**64, "a whole number from 0 to 2^64 - 1"),
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "1 or more"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a tuple of strings that are not empty"),
        }
        for name, (good, rule) in checks.items():
            if not good:
                raise UsageError(f"{name} is {getattr(self, name)!r}; give {rule}.")

    @classmethod
    def from_defaults(cls, defaults: GenerationDefaults, **overrides: Any) -> "SamplingParams":
        """The model's own settings (``generation_config.json``) with ``overrides``; None counts as not given."""
        unknown = set(overrides) - {f.name for f in fields(cls)}
        if unknown:
            raise TypeError(f"unknown sampling parameters: {', '.join(sorted(unknown))}")
        values: dict[str, Any] = {"repetition_penalty": defaults.repetition_penalty}
        if defaults.do_sample:
            values |= {name: getattr(defaults, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        return cls(**(values | {name: value for name, value in overrides.items() if value is not None}))


class Sampler:
    """Draws tokens for one sequence; the same seed and logits give the same tokens."""

    def __init__(self, params: SamplingParams, prompt: list[int], vocab_size: int, device: torch.device) -> None:
        self.params = params
        self.generator = torch.Generator(device)
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)
        self._seen: Tensor | None = None
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(prompt, device=device)] = True

    def __call__(self, logits: Tensor) -> tuple[int, float]:
        """The token chosen by float32 ``logits [vocab]`` and its log-probability under the model's own distribution."""
        if not bool(torch.isfinite(logits).all()):
            raise OctoError("The model's logits are not finite; choose another --dtype, or check the model's files.")
        scores = logits
        if self._seen is not None:
            penalty = self.params.repetition_penalty
            scores = torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.params.temperature == 0:
            choice = scores.argmax()
        else:
            # From the largest score down, so that no temperature is too small for float32.
            scaled = (scores - scores.max()) / max(self.params.temperature, torch.finfo(torch.float32).tiny)
            choice = torch.multinomial(filtered(scaled, self.params), 1, generator=self.generator)[0]
        token = int(choice)
        if self._seen is not None:
            self._seen[token] = True
        return token, float(logits[token] - logits.logsumexp(-1))


def filtered(scores: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities ``[vocab]`` (summing to 1) of float32 ``scores`` after top-k, top-p and min-p."""
    if 0 < params.top_k < scores.numel():
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -torch.inf)
    if params.top_p < 1:
        ordered, order = scores.sort(descending=True)
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share >= params.top_p  # tokens before this one already make up top_p
        beyond[0] = False
        scores = scores.masked_fill(torch.empty_like(beyond).scatter_(0, order, beyond), -torch.inf)
    if params.min_p > 0:
        scores = scores.masked_fill(scores < scores.max() + math.log(params.min_p), -torch.inf)
    return scores.softmax(-1)


def sampling_bytes(sequences: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Bytes on the device of a step's logits in ``dtype`` and of what :class:`BatchSampler` keeps and works with."""
    return sequences * vocab_size * (dtype.itemsize + 4)


class BatchSampler:
    """Draws a token for each of several sequences on the device; nothing in a draw waits for or asks the host.

    The noise of a draw depends on the sequence's seed and on how many tokens it has drawn, so the same seed and logits
    give the same tokens, whatever runs beside them or in between. The rules are those of ``SamplingParams``.
    """

    def __init__(self, sequences: int, vocab_size: int, device: torch.device) -> None:
        self._device, self._vocab = device, vocab_size
        self.drawn = torch.zeros(2, sequences, dtype=torch.int32, device=device)
        self.tokens, self._logprobs = self.drawn[0], self.drawn[1].view(torch.float32)
        self._rules = torch.zeros(4, sequences, device=device)  # temperature, top_p, log min_p, repetition_penalty
        self._whole = torch.zeros(3, sequences, dtype=torch.int64, device=device)  # top_k, seed, tokens drawn
        self._counts = torch.zeros(sequences, vocab_size, dtype=torch.int32, device=device)
        self._index = torch.arange(vocab_size, device=device)
        #: Which rules any sequence needs: a recorded draw serves the same ones. (penalty, noise, filters)
        self.kind = (False, False, False)

    def set(self, params: list[SamplingParams], seen: list[list[int]], drawn: int = 0) -> None:
        """The rules of the first ``len(params)`` sequences, the tokens their penalties count, and tokens drawn before.

        ``seed`` None takes a fresh one.
        """
        batch, tiny = len(params), torch.finfo(torch.float32).tiny
        rules = [
            (max(min(p.temperature, 1e30), tiny), p.top_p, math.log(p.min_p) if p.min_p else -math.inf,
             p.repetition_penalty)
            for p in params
        ]  # fmt: skip
        whole = [(1 if p.temperature == 0 else p.top_k or self._vocab, _signed(p.seed), drawn) for p in params]
        self._rules[:, :batch] = torch.tensor(rules).T.to(self._device)
        self._whole[:, :batch] = torch.tensor(whole).T.to(self._device)
        self.kind = (
            any(p.repetition_penalty != 1 for p in params),
            any(p.temperature > 0 for p in params),
            any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in params),
        )
        if self.kind[0]:
            self._counts[:batch].zero_()
            for row, tokens in enumerate(seen):
                self._counts[row].index_fill_(0, torch.tensor(tokens).to(self._device), 1)

    def draw(self, logits: Tensor) -> None:
        """Draw from ``logits [batch, vocab]`` of the first sequences: ``drawn`` then has tokens and log-probabilities.

        Log-probabilities are under the model's own distribution, not finite if the logits are not.
        """
        batch = len(logits)
        logits = logits.to(torch.float32)
        temperature, top_p, min_p, penalty = self._rules[:, :batch, None]
        top_k, seeds, counters = self._whole[:, :batch, None]
        scores = logits
        if self.kind[0]:
            lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
            scores = torch.where(self._counts[:batch] > 0, lowered, logits)
        if self.kind[1]:
            greedy = top_k == 1
            scores = (scores - scores.amax(-1, keepdim=True)) / temperature.where(~greedy, 1.0)
            if self.kind[2]:
                scores = _filtered_rows(scores, top_k, top_p, min_p)
            scores = torch.where(greedy, scores, scores + _gumbel(seeds, counters, self._index))
            counters.add_(1)
        tokens = scores.argmax(-1, keepdim=True)
        if self.kind[0]:
            self._counts[:batch].scatter_(1, tokens, 1)
        self.tokens[:batch].copy_(tokens[:, 0])
        self._logprobs[:batch].copy_((logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True))[:, 0])


def _signed(seed: int | None) -> int:
    """A seed (None: a fresh one) as int64 holds it."""
    seed = secrets.randbits(64) if seed is None else seed
    return seed - (1 << 64) if seed >> 63 else seed


def _filtered_rows(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """``scores [B, vocab]`` with -inf for what top-k, top-p and min-p (a logarithm), all ``[B, 1]``, leave out."""
    ordered = scores.sort(descending=True).values
    last = ordered.gather(1, (top_k - 1).clamp(0, scores.shape[1] - 1))
    ordered = ordered.masked_fill(ordered < last, -torch.inf)
    share = ordered.softmax(-1)
    within = share.cumsum(-1) - share < top_p
    nucleus = ordered.gather(1, within.sum(-1, keepdim=True).clamp(min=1) - 1)
    least = torch.maximum(torch.maximum(last, nucleus), ordered[:, :1] + min_p)
    return scores.masked_fill(scores < least, -torch.inf)


def _gumbel(seeds: Tensor, counters: Tensor, index: Tensor) -> Tensor:
    """Gumbel noise, float32 ``[B, vocab]``: a hash of seed, counter (int64 ``[B, 1]``) and token."""
    mixed = _hash(_hash(seeds ^ _hash(counters)) + index)
    share = (((mixed >> 40) & 0xFFFFFF).to(torch.float32) + 0.5) * 2.0**-24
    return -torch.log(-torch.log1p(-share))


def _hash(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014) on int64; multiplication wraps around."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))
