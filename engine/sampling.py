"""Choosing the next token from logits."""

from __future__ import annotations

import math
import numbers
import secrets
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from octo_run.engine.grammar import Grammar, Guide
from octo_run.engine.sampling_rules import HISTORY, MAX_BIASED, MAX_TOP, ScoreRules
from octo_run.errors import UsageError, quoted
from octo_run.kernels import step as ops
from octo_run.models.config import GenerationDefaults

#: Temperatures and penalties lie below it (penalties above its inverse), so that float32 holds every score.
_MOST = 1e30
_REAL = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "typical_p",
    "top_n_sigma", "xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base",
)  # fmt: skip
_WHOLE = ("top_k", "seed", "max_tokens", "penalty_range", "dry_allowed_length", "dry_range", "logprobs")


def _refused(name: str, value: object, rule: str) -> UsageError:
    return UsageError(f"{name} is {quoted(value)}; give {rule}.")


def _real(name: str, value: Any) -> float:
    """A number (NumPy's scalars are numbers, truth values are not) as a float."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except (OverflowError, ValueError):
            pass
    raise _refused(name, value, "a number")


def _whole(name: str, value: Any) -> int:
    """A whole number (NumPy's, too) as an int."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise _refused(name, value, "a whole number")
    return int(value)


def _texts(stop: Any) -> tuple[str, ...]:
    """Stop strings as a tuple."""
    rule = "a tuple of strings that are not empty"
    if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) and text for text in stop):
        raise _refused("stop", stop, rule)
    for text in stop:
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise _refused("stop", stop, f"{rule} and hold no half surrogate pair")
    return tuple(stop)


def _ids(stop_ids: Any) -> tuple[int, ...]:
    """Token ids as a tuple; they may lie in an array."""
    stop_ids = stop_ids.tolist() if hasattr(stop_ids, "tolist") else stop_ids
    if not isinstance(stop_ids, (tuple, list, set, frozenset)):
        raise _refused("stop_ids", stop_ids, "a tuple of token ids")
    return tuple(_whole("stop_ids", token) for token in stop_ids)


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    """A bias as pairs of a token id and what is added to its logit."""
    rule = f"token ids, {MAX_BIASED} at most, and numbers from -100 (never) to 100"
    try:
        pairs = value.items() if isinstance(value, Mapping) else value
        found = {_whole("logit_bias", token): _real("logit_bias", number) for token, number in pairs}
    except (TypeError, ValueError):
        raise _refused("logit_bias", value, rule) from None
    if len(found) > MAX_BIASED or not all(t >= 0 and abs(number) <= 100 for t, number in found.items()):
        raise _refused("logit_bias", value, rule)
    return tuple(sorted(found.items()))


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    The rules apply in the order repetition penalty, presence and frequency penalty, DRY, bias, grammar, temperature,
    top-n-sigma, top-k, typical-p, top-p, min-p, XTC. Numbers may be of any type, NumPy's included, and are kept as
    ``float`` and ``int``.

    Attributes:
        temperature: 0 is greedy, and so is a temperature too small for float32.
        top_k: 0 switches it off.
        top_p: 1 switches it off.
        min_p: 0 switches it off.
        repetition_penalty: Divides positive and multiplies negative logits of tokens of prompt and answer; 1 switches
            it off.
        presence_penalty: Subtracted once from logits of the answer's tokens; 0 switches it off.
        frequency_penalty: Subtracted from logits of the answer's tokens for each time they occur; 0 switches it off.
        seed: None takes a fresh one.
        max_tokens: None means as many as the context holds.
        stop: Strings that end generation where the answer's text holds one of them (:mod:`octo_run.engine.stopping`
            says what counts as its text).
        stop_ids: Tokens that end generation, in addition to the model's own end tokens.
        penalty_range: The three penalties count the last so many tokens, 4,096 at most; 0: all of them.
        typical_p: The tokens whose surprise is nearest to what is expected, of this probability together; 1 switches it
            off (Meister et al. 2022).
        top_n_sigma: Tokens whose logit is at most so many standard deviations below the best one's; 0 switches it off
            (Tang et al. 2024).
        xtc_probability: How often all but the least likely of the tokens of ``xtc_threshold`` or more are left out; 0
            switches it off.
        xtc_threshold: Probability, from 0 to 0.5.
        dry_multiplier: A token that would go on with a repetition of n tokens loses ``dry_multiplier * dry_base ** (n -
            dry_allowed_length)``, where n is ``dry_allowed_length`` or more; 0 switches it off.
        dry_range: DRY looks at the last so many tokens, 4,096 at most; 0: at these.
        logit_bias: What is added to the logits of tokens: a dict, or pairs of id and number; -100 is never.
        logprobs: So many of the likeliest tokens are told beside each one that is drawn, 20 at most.
        grammar: What the answer must be (:mod:`octo_run.engine.grammar`).

    Raises:
        UsageError: Values of another kind or out of range.
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
    penalty_range: int = 0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int = 0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name in _REAL:
            object.__setattr__(self, name, _real(name, getattr(self, name)))
        for name in _WHOLE:
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else _whole(name, value))
        object.__setattr__(self, "stop", _texts(self.stop))
        object.__setattr__(self, "stop_ids", _ids(self.stop_ids))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise _refused("grammar", self.grammar, "a Grammar")
        checks = {
            "temperature": (0 <= self.temperature <= _MOST, f"0 (greedy) or more, at most {_MOST:g}"),
            "top_k": (0 <= self.top_k < 2**31, "0 (off) or more, below 2^31"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p < 1, "at least 0 (off) and below 1"),
            "repetition_penalty": (
                1 / _MOST <= self.repetition_penalty <= _MOST,
                f"a number from {1 / _MOST:g} to {_MOST:g} (1 is off)",
            ),
            "presence_penalty": (abs(self.presence_penalty) <= 100, "a number from -100 to 100 (0 is off)"),
            "frequency_penalty": (abs(self.frequency_penalty) <= 100, "a number from -100 to 100 (0 is off)"),
            "seed": (self.seed is None or 0 <= self.seed < 2**64, "a whole number from 0 to 2^64 - 1"),
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "1 or more"),
            "penalty_range": (0 <= self.penalty_range <= HISTORY, f"0 (all tokens) to {HISTORY:,}"),
            "typical_p": (0 < self.typical_p <= 1, "above 0 and at most 1 (off)"),
            "top_n_sigma": (0 <= self.top_n_sigma <= 1000, "0 (off) to 1000"),
            "xtc_probability": (0 <= self.xtc_probability <= 1, "0 (off) to 1"),
            "xtc_threshold": (0 <= self.xtc_threshold <= 0.5, "0 to 0.5"),
            "dry_multiplier": (0 <= self.dry_multiplier <= 100, "0 (off) to 100"),
            "dry_base": (1 <= self.dry_base <= 10, "1 to 10"),
            "dry_allowed_length": (1 <= self.dry_allowed_length <= 64, "1 to 64"),
            "dry_range": (0 <= self.dry_range <= HISTORY, f"0 (the last {HISTORY:,} tokens) to {HISTORY:,}"),
            "logprobs": (0 <= self.logprobs <= MAX_TOP, f"0 to {MAX_TOP}"),
        }
        for name, (good, rule) in checks.items():
            if not good:
                raise _refused(name, getattr(self, name), rule)

    @property
    def penalises(self) -> bool:
        """Whether tokens that occurred are treated differently."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @classmethod
    def from_defaults(cls, defaults: GenerationDefaults, **overrides: Any) -> SamplingParams:
        """The model's own settings (``generation_config.json``) with ``overrides``; None counts as not given."""
        unknown = set(overrides) - {f.name for f in fields(cls)}
        if unknown:
            raise TypeError(f"unknown sampling parameters: {', '.join(sorted(unknown))}")
        given = {name: value for name, value in overrides.items() if value is not None}
        return cls(**(cls.own(defaults) | given))

    @staticmethod
    def own(defaults: GenerationDefaults) -> dict[str, Any]:
        """The model's own settings by their names; what it does not say is not among them."""
        values: dict[str, Any] = {"temperature": defaults.temperature} if defaults.do_sample else {}
        for name in (*(("top_k", "top_p", "min_p") if defaults.do_sample else ()), "repetition_penalty"):
            value = getattr(defaults, name)
            if value != getattr(GenerationDefaults, name):
                values[name] = value
        return values


@dataclass(eq=False)
class Sampling:
    """How one sequence's tokens are drawn.

    Attributes:
        drawn: Tokens drawn so far: the noise of a draw depends on the seed and on their number.
        guide: Knows which tokens the grammar allows next.
    """

    params: SamplingParams
    seed: int
    drawn: int
    guide: Guide | None = None


class BatchSampler:
    """Draws a token for each of several sequences on the device; nothing in a draw waits for or asks the host.

    The noise of a draw depends on the sequence's seed and on how many tokens it has drawn, so the same seed and logits
    give the same tokens on every device, whatever runs beside them or in between. Tokens, log-probabilities and counts
    lie by the sequences' rows in the arena, rules and counters in the order of the sequences that a step is for.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab = vocab_size
        #: Tokens, the bits of their log-probabilities, and the likeliest tokens with those of theirs.
        self.drawn = torch.zeros(2 + 2 * MAX_TOP, rows, dtype=torch.int32, device=device)
        self.tokens = self.drawn[0]
        self._rules = torch.zeros(6, rows, device=device)  # temperature, the three penalties, top_p, log min_p
        self._whole = torch.zeros(3, rows, dtype=torch.int64, device=device)  # seed, tokens drawn, top_k
        self._counts = torch.zeros(rows + 1, vocab_size, dtype=torch.int32, device=device)  # the last is filler's
        self._slices = torch.zeros(rows, 4, -(-vocab_size // ops.SLICE_TOKENS), device=device)
        self._counted = self._noisy = self._filtered = self._tops = False
        #: Rules beyond these.
        self.rules = ScoreRules(rows, vocab_size, device)

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """Which rules any sequence has: a recorded draw serves sequences of its own kind."""
        return self._counted, self._noisy, self._filtered, self._tops, self.rules.kinds

    def enter(self, row: int, params: SamplingParams, seen: list[int], drawn: int = 0) -> Sampling:
        """Set the rules of the sequence in a row, and the tokens that penalties count.

        Args:
            params: The rules; a seed of None becomes a fresh one.
            seen: The tokens that penalties count.
            drawn: How many of the last of them have been drawn already.
        """
        if params.penalises:
            counts = self._counts[row].zero_()
            places = torch.tensor(seen, dtype=torch.int64).to(counts.device)
            answer = places[max(0, len(seen) - drawn) :]
            counts.index_add_(0, answer, torch.full_like(answer, 2, dtype=torch.int32))
            counts.index_copy_(0, places, counts[places] | 1)
        self.rules.enter(row, params, seen, drawn)
        return Sampling(params, _signed(params.seed), drawn)

    def arrange(self, samplings: list[Sampling]) -> None:
        """Draw from now on for these sequences, in this order. Waits for nothing."""
        params = [sampling.params for sampling in samplings]
        rules = [
            (
                p.temperature,
                p.repetition_penalty,
                p.presence_penalty,
                p.frequency_penalty,
                p.top_p if p.top_p < 1 else 2.0,  # sums of shares in float32 reach 1 before their end
                math.log(p.min_p) if p.min_p else -math.inf,
            )
            for p in params
        ]
        whole = [(sampling.seed, sampling.drawn, sampling.params.top_k or self._vocab) for sampling in samplings]
        numbers = [(torch.tensor(values, dtype=into.dtype).T.contiguous(), into)
                   for values, into in ((rules, self._rules), (whole, self._whole))]  # fmt: skip
        for host, into in (*numbers, (self.rules.arrange(params), self.rules.upload)):
            into[:, : len(params)].copy_(host.pin_memory() if into.is_cuda else host, non_blocking=True)
        self._counted = any(p.penalises for p in params)
        self._noisy = any(p.temperature > 0 for p in params)
        self._filtered = any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in params)
        self._tops = any(p.logprobs for p in params)

    def draw(self, logits: Tensor, rows: Tensor) -> None:
        """Draw a token for each sequence: ``drawn`` then has their tokens and log-probabilities.

        Log-probabilities are under the model's own distribution, not finite if the logits are not.

        Args:
            logits: ``[batch, vocab]``.
            rows: The rows of the sequences, int32 ``[batch]`` (-1: none).
        """
        batch, kinds = len(logits), self.rules.kinds
        if kinds.ranged:
            self.rules.recount(rows[:batch], self._counts)
        draws = self._draws(batch, rows)
        if kinds.edited:
            draws.edits = self.rules.edits(rows[:batch])
        if kinds.chosen:
            top_p, min_p = self._rules[4:6, :batch, None]
            kept = self.rules.chosen(draws.scores(logits), draws, self._whole[2, :batch, None], top_p, min_p)
            assert draws.edits is not None
            draws.edits.masked_fill_(~kept, -torch.inf)
            ops.sample(draws, logits, None)
        else:
            ops.sample(draws, logits, self._floor(draws, logits) if self._filtered else None)
        if self._tops:
            self._tell_tops(logits, rows[:batch])
        if kinds.remembers:
            self.rules.remember(rows[:batch], self.tokens)

    def _tell_tops(self, logits: Tensor, rows: Tensor) -> None:
        """The likeliest tokens by the model's own distribution, and their log-probabilities, by rows."""
        count = min(MAX_TOP, self._vocab)
        values, ids = logits.to(torch.float32).log_softmax(-1).topk(count, -1)
        both = torch.cat((ids.to(torch.int32), values.view(torch.int32)), 1).T  # [2 count, batch]
        spare = self.drawn.new_zeros(len(self.drawn), 1)
        wide = torch.cat((self.drawn, spare), 1)  # filler's column is the last
        places = torch.where(rows < 0, wide.shape[1] - 1, rows).long()
        for first, part in ((2, both[:count]), (2 + MAX_TOP, both[count:])):
            wide[first : first + count].index_copy_(1, places, part.contiguous())
        self.drawn[2:].copy_(wide[2:, :-1])

    def _draws(self, batch: int, rows: Tensor) -> ops.Draws:
        return ops.Draws(
            rows=rows,
            temperature=self._rules[0, :batch],
            penalties=self._rules[1:4, :batch],
            seeds=self._whole[0, :batch],
            counters=self._whole[1, :batch],
            counts=self._counts,
            slices=self._slices,
            tokens=self.tokens,
            logprobs=self.drawn[1].view(torch.float32),
            counted=self._counted,
            noisy=self._noisy,
        )

    def floor(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The lowest score that top-k, top-p and min-p leave in, float32 ``[batch]``; see :meth:`draw`."""
        return self._floor(self._draws(len(logits), rows), logits)

    def _floor(self, draws: ops.Draws, logits: Tensor) -> Tensor:
        batch = len(logits)
        temperature, *_, top_p, min_p = self._rules[:, :batch, None]
        ordered = draws.scores(logits).sort(descending=True).values
        largest, temperature = ordered[:, :1], temperature.clamp(min=torch.finfo(torch.float32).tiny)
        least = ordered.gather(1, (self._whole[2, :batch, None] - 1).clamp(0, self._vocab - 1))
        share = ((ordered - largest) / temperature).masked_fill(ordered < least, -torch.inf).softmax(-1)
        within = (share.cumsum(-1) - share < top_p).sum(-1, keepdim=True).clamp(min=1)
        nucleus = ordered.gather(1, within - 1)
        return torch.maximum(torch.maximum(least, nucleus), largest + temperature * min_p)[:, 0]


def _signed(seed: int | None) -> int:
    """A seed (None: a fresh one) as int64 holds it."""
    seed = secrets.randbits(64) if seed is None else seed
    return seed - (1 << 64) if seed >> 63 else seed
