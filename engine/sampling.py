"""Choosing the next token from logits."""

import math
import secrets
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from octo_run.errors import OctoError, UsageError
from octo_run.kernels import step as ops
from octo_run.models.config import GenerationDefaults


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0, ``repetition_penalty`` 1, ``presence_penalty``
    and ``frequency_penalty`` 0 switch the respective rule off. The rules apply in the order repetition penalty (divides
    positive and multiplies negative logits of tokens of prompt and answer), presence and frequency penalty (subtracted
    from logits of the answer's tokens, once, and for each time they occur), temperature, top-k, top-p, min-p. ``seed``
    None takes a fresh seed. ``max_tokens`` None means as many as the context holds. Generation ends at one of
    ``stop_ids`` (in addition to the model's own end tokens) or where the text holds one of the strings ``stop``. Raises
    ``UsageError`` for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
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
            "presence_penalty": (abs(self.presence_penalty) <= 100, "a number from -100 to 100 (0 is off)"),
            "frequency_penalty": (abs(self.frequency_penalty) <= 100, "a number from -100 to 100 (0 is off)"),
            "seed": (self.seed is None or 0 <= self.seed < 2**64, "a whole number from 0 to 2^64 - 1"),
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "1 or more"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a tuple of strings that are not empty"),
        }
        for name, (good, rule) in checks.items():
            if not good:
                raise UsageError(f"{name} is {getattr(self, name)!r}; give {rule}.")

    @property
    def penalises(self) -> bool:
        """Whether tokens that occurred are treated differently."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

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
        self._counts: Tensor | None = None
        if params.penalises:
            self._counts = torch.zeros(1, vocab_size, dtype=torch.int32, device=device)
            self._counts[0, torch.tensor(prompt, dtype=torch.int64, device=device)] = 1
            rules = [[params.repetition_penalty], [params.presence_penalty], [params.frequency_penalty]]
            self._penalties = torch.tensor(rules, device=device)

    def __call__(self, logits: Tensor) -> tuple[int, float]:
        """The token chosen by float32 ``logits [vocab]`` and its log-probability under the model's own distribution."""
        if not bool(torch.isfinite(logits).all()):
            raise OctoError("The model's logits are not finite; choose another --dtype, or check the model's files.")
        scores = logits
        if self._counts is not None:
            scores = ops.penalised(logits[None], self._counts, self._penalties)[0]
        if self.params.temperature == 0:
            choice = scores.argmax()
        else:
            # From the largest score down, so that no temperature is too small for float32.
            scaled = (scores - scores.max()) / max(self.params.temperature, torch.finfo(torch.float32).tiny)
            choice = torch.multinomial(filtered(scaled, self.params), 1, generator=self.generator)[0]
        token = int(choice)
        if self._counts is not None:
            ops.count_drawn(self._counts, choice.view(1, 1))
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
    """Bytes on the device of a step's logits in ``dtype`` and of what :class:`BatchSampler` keeps."""
    return sequences * vocab_size * (dtype.itemsize + 4) + sequences * 16 * -(-vocab_size // ops.PART_TOKENS)


class BatchSampler:
    """Draws a token for each of several sequences on the device; nothing in a draw waits for or asks the host.

    The noise of a draw depends on the sequence's seed and on how many tokens it has drawn, so the same seed and logits
    give the same tokens, whatever runs beside them or in between. The rules are those of ``SamplingParams``.
    """

    def __init__(self, sequences: int, vocab_size: int, device: torch.device) -> None:
        self._device, self._vocab = device, vocab_size
        self.drawn = torch.zeros(2, sequences, dtype=torch.int32, device=device)
        self.tokens = self.drawn[0]
        self._rules = torch.zeros(6, sequences, device=device)  # temperature, the three penalties, top_p, log min_p
        self._whole = torch.zeros(3, sequences, dtype=torch.int64, device=device)  # seed, tokens drawn, top_k
        self._draws = ops.Draws(
            rows=torch.arange(sequences, dtype=torch.int32, device=device),
            temperature=self._rules[0],
            penalties=self._rules[1:4],
            seeds=self._whole[0],
            counters=self._whole[1],
            counts=torch.zeros(sequences, vocab_size, dtype=torch.int32, device=device),
            parts=torch.zeros(sequences, 4, -(-vocab_size // ops.PART_TOKENS), device=device),
            tokens=self.tokens,
            logprobs=self.drawn[1].view(torch.float32),
        )
        self._filtered = False

    @property
    def kind(self) -> tuple[bool, bool, bool]:
        """Whether any sequence has a penalty, noise, filters: a recorded draw serves sequences of its own kind."""
        return self._draws.counted, self._draws.noisy, self._filtered

    def set(self, params: list[SamplingParams], seen: list[list[int]], drawn: int = 0) -> None:
        """The rules of the first ``len(params)`` sequences, and the tokens that penalties count, of which the last
        ``drawn`` have been drawn already. ``seed`` None takes a fresh one.
        """
        batch, draws = len(params), self._draws
        rules = [
            (
                min(p.temperature, 1e30),
                p.repetition_penalty,
                p.presence_penalty,
                p.frequency_penalty,
                p.top_p,
                math.log(p.min_p) if p.min_p else -math.inf,
            )
            for p in params
        ]
        whole = [(_signed(p.seed), drawn, p.top_k or self._vocab) for p in params]
        self._rules[:, :batch] = torch.tensor(rules).T.to(self._device)
        self._whole[:, :batch] = torch.tensor(whole).T.to(self._device)
        draws.counted = any(p.penalises for p in params)
        draws.noisy = any(p.temperature > 0 for p in params)
        self._filtered = any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in params)
        if draws.counted:
            draws.counts[:batch].zero_()
            for row, tokens in zip(draws.counts, seen, strict=False):
                places = torch.tensor(tokens, dtype=torch.int64).to(self._device)
                answer = places[max(0, len(tokens) - drawn) :]
                row.index_add_(0, answer, torch.full_like(answer, 2, dtype=torch.int32))
                row.index_copy_(0, places, row[places] | 1)

    def draw(self, logits: Tensor) -> None:
        """Draw from ``logits [batch, vocab]`` of the first sequences: ``drawn`` then has tokens and log-probabilities.

        Log-probabilities are under the model's own distribution, not finite if the logits are not.
        """
        ops.sample(self._draws, logits, self._floor(logits) if self._filtered else None)

    def _floor(self, logits: Tensor) -> Tensor:
        """The lowest score that top-k, top-p and min-p leave in, float32 ``[batch]``."""
        batch = len(logits)
        temperature, *_, top_p, min_p = self._rules[:, :batch, None]
        ordered = self._draws.scores(logits).sort(descending=True).values
        largest, temperature = ordered[:, :1], temperature.clamp(min=torch.finfo(torch.float32).tiny)
        least = ordered.gather(1, (self._whole[2, :batch, None] - 1).clamp(max=self._vocab - 1))
        share = ((ordered - largest) / temperature).masked_fill(ordered < least, -torch.inf).softmax(-1)
        within = (share.cumsum(-1) - share < top_p).sum(-1, keepdim=True).clamp(min=1)
        nucleus = ordered.gather(1, within - 1)
        return torch.maximum(torch.maximum(least, nucleus), largest + temperature * min_p)[:, 0]


def _signed(seed: int | None) -> int:
    """A seed (None: a fresh one) as int64 holds it."""
    seed = secrets.randbits(64) if seed is None else seed
    return seed - (1 << 64) if seed >> 63 else seed
