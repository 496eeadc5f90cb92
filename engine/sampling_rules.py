"""Rules of sampling beyond penalties, top-k, top-p and min-p: they edit scores before a token is drawn.

All of it is PyTorch on the device of the logits, the same on a CPU and a GPU, without waiting for anything, so that a
step can be recorded. What lasts lies by the sequences' rows in the arena, with one row more for filler.

The order is: penalties, DRY, bias, grammar; then, at a temperature above 0, top-n-sigma, top-k, typical-p, top-p, min-p
and XTC, each over what those before it left in.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.kernels import step as ops

if TYPE_CHECKING:
    from octo_run.engine.sampling import SamplingParams
    from octo_run.tokenizer import Tokenizer

#: Tokens that DRY and ranges of penalties look back at most.
HISTORY = 4096
#: Tokens of a repetition that DRY counts at most: its penalty grows with their number.
_LONGEST_REPETITION = 64
#: Tokens of a bias at most.
MAX_BIASED = 256
#: Alternatives of a token whose log-probabilities are told, at most.
MAX_TOP = 20
#: Texts over which DRY sees no repetition: a token that holds one of them ends what is compared.
BREAKERS = ("\n", ":", '"', "*")
_XTC_INDEX = -7  # of the random number of XTC: no token has it
_BITS = 32
_OF_RULES = 11


def breaking_tokens(tokenizer: "Tokenizer") -> list[int]:
    """The tokens that hold one of ``BREAKERS``, and the special ones."""
    breakers = [text.encode() for text in BREAKERS]
    holds = (token for token in range(tokenizer.vocab_size) if any(b in tokenizer.piece(token) for b in breakers))
    return sorted({*holds, *tokenizer.special_ids})


@dataclass(frozen=True)
class Kinds:
    """Which rules any sequence of a set has: a recorded draw serves sets of its own kinds."""

    biased: bool = False
    dry: bool = False
    ranged: bool = False
    guided: bool = False
    chosen: bool = False  # typical-p, top-n-sigma or XTC

    @property
    def edited(self) -> bool:
        """Whether scores are edited."""
        return self.biased or self.dry or self.guided or self.chosen

    @property
    def remembers(self) -> bool:
        """Whether drawn tokens are remembered in order."""
        return self.dry or self.ranged


def has_choice(params: "SamplingParams") -> bool:
    """Whether typical-p, top-n-sigma or XTC is on."""
    on = params.typical_p < 1 or params.top_n_sigma > 0 or params.xtc_probability > 0
    return params.temperature > 0 and on


class ScoreRules:
    """The state and the work of these rules for the sequences of an arena."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self._spare, self._vocab = rows, vocab_size
        self._history = torch.full((rows + 1, HISTORY), -1, dtype=torch.int32, device=device)  # newest last
        self._matches = torch.zeros(rows + 1, HISTORY, dtype=torch.int32, device=device)
        self._answer = torch.zeros(rows + 1, dtype=torch.int32, device=device)  # drawn tokens in the history
        self._bias_ids = torch.zeros(rows + 1, MAX_BIASED, dtype=torch.int64, device=device)
        self._bias = torch.zeros(rows + 1, MAX_BIASED, device=device)
        self._allowed = torch.full(
            (rows + 1, -(-vocab_size // _BITS)), -1, dtype=torch.int32, device=device
        )  # a bit for each token
        self._rules = torch.zeros(_OF_RULES, rows, device=device)
        self.breakers = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.kinds = Kinds()

    def enter(self, row: int, params: "SamplingParams", seen: list[int], drawn: int) -> None:
        """Take up the rules of a sequence, and the tokens before the next one.

        Args:
            drawn: How many of the last of them have been drawn.
        """
        device = self._history.device
        if params.dry_multiplier or params.penalty_range:
            tokens = torch.tensor(seen[-HISTORY:], dtype=torch.int32).to(device)
            self._history[row].fill_(-1)
            self._history[row, HISTORY - len(tokens) :] = tokens
            self._answer[row].fill_(drawn)
            if params.dry_multiplier:
                self._matches[row].copy_(self._matching(self._history[row]))
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            self._bias_ids[row].zero_()
            self._bias[row].zero_()
            self._bias_ids[row, : len(ids)] = torch.tensor(ids).to(device)
            self._bias[row, : len(ids)] = torch.tensor([v if v > -100 else -math.inf for v in values]).to(device)

    def _matching(self, history: Tensor) -> Tensor:
        """How many tokens up to each place are those at the end, int32 like ``history``."""
        equal = torch.ones_like(history, dtype=torch.bool)
        count = torch.zeros_like(history)
        padded = torch.cat((history.new_full((_LONGEST_REPETITION,), -1), history))
        for back in range(_LONGEST_REPETITION):
            last = history[-1 - back]
            at = padded[_LONGEST_REPETITION - back : len(padded) - back]
            equal &= (at == last) & (last >= 0) & ~self._breaks(last)
            count += equal
        count[-1] = 0
        return count

    def _breaks(self, tokens: Tensor) -> Tensor:
        """Whether tokens end what is compared."""
        return self.breakers[tokens.long().clamp(min=0)]

    def arrange(self, params: "list[SamplingParams]") -> Tensor:
        """Draw for sequences of these rules from now on.

        Returns:
            The numbers of the rules on the host, float32 ``[rules, n]``, to be copied into ``upload``.
        """
        self.kinds = Kinds(
            biased=any(p.logit_bias for p in params),
            dry=any(p.dry_multiplier for p in params),
            ranged=any(p.penalty_range and p.penalises for p in params),
            guided=any(p.grammar is not None for p in params),
            chosen=any(map(has_choice, params)),
        )
        return torch.tensor(
            [
                (
                    p.dry_multiplier,
                    p.dry_base,
                    p.dry_allowed_length,
                    p.dry_range or HISTORY,
                    p.penalty_range,
                    bool(p.logit_bias),
                    p.grammar is not None,
                    p.typical_p,
                    p.top_n_sigma,
                    p.xtc_probability,
                    p.xtc_threshold,
                )
                for p in params
            ],
            dtype=torch.float32,
        ).T.contiguous()

    @property
    def upload(self) -> Tensor:
        """Where the numbers of :meth:`arrange` go on the device."""
        return self._rules

    def allow(self, row: int, bits: Tensor) -> None:
        """Let a guided sequence draw only the tokens whose bits are set.

        Args:
            bits: int32 ``[ceil(vocab / 32)]`` on the host, page-locked where the device is a GPU.
        """
        self._allowed[row].copy_(bits, non_blocking=True)

    def _places(self, rows: Tensor) -> Tensor:
        """Rows of what lasts: filler has the spare one."""
        return torch.where(rows < 0, self._spare, rows).long()

    def recount(self, rows: Tensor, counts: Tensor) -> None:
        """Count for penalties with a range what lies in it.

        Args:
            counts: As ``Draws.counts``, with the spare row.
        """
        batch, places = len(rows), self._places(rows)
        reach = self._rules[4, :batch, None]
        history, age = self._history[places], torch.arange(HISTORY - 1, -1, -1, device=rows.device)
        inside = (history >= 0) & (age < reach)
        drawn = inside & (age < self._answer[places][:, None])
        at = history.clamp(min=0).long()
        found = torch.zeros(batch, self._vocab, dtype=torch.int32, device=rows.device)
        times = found.clone().scatter_add_(1, at, 2 * drawn.to(torch.int32))
        there = found.scatter_reduce_(1, at, inside.to(torch.int32), "amax")
        counts.index_copy_(0, places, torch.where(reach > 0, times | there, counts.index_select(0, places)))

    def edits(self, rows: Tensor) -> Tensor:
        """What DRY, bias and grammar add to the scores, float32 ``[batch, vocab]``."""
        batch, places = len(rows), self._places(rows)
        out = torch.zeros(batch, self._vocab, device=rows.device)
        if self.kinds.dry:
            out -= self._repetition(places, batch)
        if self.kinds.biased:
            values = torch.where(self._rules[5, :batch, None] > 0, self._bias[places], 0.0)
            out.scatter_add_(1, self._bias_ids[places], values)
        if self.kinds.guided:
            bits = torch.arange(_BITS, device=rows.device, dtype=torch.int32)
            allowed = (self._allowed[places][..., None] >> bits & 1).flatten(1)[:, : self._vocab]
            out.masked_fill_((allowed == 0) & (self._rules[6, :batch, None] > 0), -torch.inf)
        return out

    def _repetition(self, places: Tensor, batch: int) -> Tensor:
        """DRY's penalty of the tokens that would go on with a repetition."""
        multiplier, base, allowed, reach = self._rules[:4, :batch, None]
        history, matches = self._history[places], self._matches[places].to(torch.float32)
        age = torch.arange(HISTORY - 1, -1, -1, device=places.device)
        long_enough = (matches[:, :-1] >= allowed) & (age[:-1] < reach) & (multiplier > 0)
        penalty = torch.where(long_enough, multiplier * base ** (matches[:, :-1] - allowed), 0.0)
        following = history[:, 1:]
        penalty = penalty.masked_fill(self._breaks(following) | (following < 0), 0.0).clamp(max=1e9)
        out = torch.zeros(batch, self._vocab, device=places.device)
        return out.scatter_reduce_(1, following.clamp(min=0).long(), penalty, "amax")

    def remember(self, rows: Tensor, tokens: Tensor) -> None:
        """Add the drawn tokens to the histories.

        Args:
            tokens: Of all rows, int32.
        """
        places = self._places(rows)
        token = tokens.index_select(0, rows.clamp(min=0))[:, None]
        history = torch.cat((self._history[places][:, 1:], token), 1)
        matches = self._matches[places]
        same = (history[:, :-1] == token) & ~self._breaks(token)
        grown = torch.where(same, (matches[:, :-1] + 1).clamp(max=_LONGEST_REPETITION), 0)
        self._history.index_copy_(0, places, history)
        self._matches.index_copy_(0, places, torch.cat((grown, torch.zeros_like(token)), 1))
        self._answer.index_copy_(0, places, self._answer[places] + 1)

    def chosen(self, scores: Tensor, draws: ops.Draws, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        """Which tokens top-n-sigma, top-k, typical-p, top-p, min-p and XTC leave in, in this order.

        Args:
            scores: float32 ``[batch, vocab]``.
            top_k, top_p, min_p: ``[batch, 1]``; ``min_p`` as its logarithm.

        Returns:
            bool ``[batch, vocab]``; all for a sequence of temperature 0.
        """
        batch = len(scores)
        typical, sigma, chance, threshold = self._rules[7:11, :batch, None]
        temperature = draws.temperature[:batch, None]
        finite = scores.isfinite()
        known = scores.masked_fill(~finite, 0.0)
        number = finite.sum(-1, keepdim=True).clamp(min=1)
        mean = known.sum(-1, keepdim=True) / number
        spread = (((known - mean) * finite).square().sum(-1, keepdim=True) / number).sqrt()
        ordered, index = scores.sort(descending=True)
        largest = ordered[:, :1]
        keep = ordered.isfinite() & ((sigma == 0) | (ordered >= largest - sigma * spread))
        keep &= ordered >= ordered.gather(1, (top_k - 1).clamp(0, self._vocab - 1))
        tempered = (ordered - largest) / temperature.clamp(min=torch.finfo(torch.float32).tiny)

        def shares() -> Tensor:
            return tempered.masked_fill(~keep, -torch.inf).softmax(-1)

        share = shares()
        surprise = -share.clamp(min=1e-38).log()
        distance = (surprise - (share * surprise).sum(-1, keepdim=True)).abs().masked_fill(~keep, torch.inf)
        order = distance.argsort(dim=-1, stable=True)
        mass = share.gather(1, order)
        within = (mass.cumsum(-1) - mass < typical) | (typical >= 1)
        keep &= torch.zeros_like(keep).scatter(1, order, within)
        share = shares()
        keep &= (share.cumsum(-1) - share < top_p) & (share >= share.amax(-1, keepdim=True) * min_p.exp())
        share = shares()
        above = keep & (share >= threshold)
        least = share.masked_fill(~above, torch.inf).amin(-1, keepdim=True)
        often = above.sum(-1, keepdim=True) >= 2
        struck = ops.share(draws.seeds[:batch, None], draws.counters[:batch, None], _XTC_INDEX) < chance
        keep &= ~(above & (share > least) & often & struck)
        return torch.zeros_like(keep).scatter(1, index, keep) | (temperature == 0)
