"""Needle in a haystack: one number asked for, hidden in a long text among other such numbers.

The sentences and the question are those that the embedded model was trained on ("The special magic number for NAME is
DIGITS."); with several keys as in RULER (Hsieh et al., 2024), where a model that only looks for a number fails. All
formats get the same prompts, made from one seed.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from octo_run.engine.engine import Engine
from octo_run.engine.evaluation.statistics import wilson
from octo_run.engine.sampling import SamplingParams
from octo_run.errors import UsageError
from octo_run.tokenizer import Tokenizer

#: Where the question stands: in the same message as the text, in a message after it, or as a sentence to complete.
FORMS = ("message", "text", "raw")
#: Tokens of a length that are left to the answer.
ANSWER_TOKENS = 32
# fmt: off
_NAMES = (
    "Adam", "Alice", "Bruno", "Carla", "Clara", "Daniel", "Edith", "Elias", "Emma", "Felix", "Fiona", "George",
    "Hannah", "Helen", "Hugo", "Irene", "Ivan", "Jacob", "Julia", "Karl", "Laura", "Leo", "Lydia", "Marcus",
    "Maria", "Martin", "Nora", "Oliver", "Paula", "Peter", "Rachel", "Robert", "Rosa", "Samuel", "Sarah",
    "Simon", "Sophie", "Teresa", "Thomas", "Victor", "Walter", "Yusuf",
)
# fmt: on
#: Keys that there are: the asked one and its distractors are chosen among them.
KEYS = len(_NAMES)
_WORDS_AT_MOST = 60  # of a "sentence": text without full stops is cut


@dataclass(frozen=True)
class Haystack:
    """A prompt: its token ids, the key that is asked for, its value, and where in the text (0..1) they stand."""

    ids: list[int]
    key: str
    value: str
    depth: float


@dataclass(frozen=True)
class Cell:
    """How often a format found the number at one length and depth.

    Attributes:
        length: In tokens, the answer included.
        depth: None for all depths together.
        low: Lower end of the 95 % Wilson interval of ``recall``.
        high: Its upper end.
    """

    kv: str
    length: int
    depth: float | None
    trials: int
    correct: int
    recall: float
    low: float
    high: float


class Filler:
    """A text cut into sentences, with their sizes in tokens; ``take`` goes round where it ends.

    Raises:
        UsageError: A text without a sentence.
    """

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
        pieces = [piece for sentence in sentences for piece in _short(sentence)]
        self._sentences = [(piece, len(tokenizer.encode(" " + piece))) for piece in pieces]
        if not self._sentences:
            raise UsageError("The text to hide numbers in is empty; give another --text.")

    def take(self, tokens: int, source: random.Random) -> tuple[list[str], list[int]]:
        """Consecutive sentences from a random one on.

        Args:
            tokens: What they have at most together.

        Returns:
            The sentences, and their sizes in tokens.
        """
        place, left = source.randrange(len(self._sentences)), tokens
        taken: list[tuple[str, int]] = []
        while (sentence := self._sentences[(place + len(taken)) % len(self._sentences)])[1] <= left:
            taken.append(sentence)
            left -= sentence[1]
        return [text for text, _ in taken], [size for _, size in taken]


def _short(sentence: str) -> Iterator[str]:
    words = sentence.split()
    for first in range(0, len(words), _WORDS_AT_MOST):
        yield " ".join(words[first : first + _WORDS_AT_MOST])


def statement(key: str, value: str) -> str:
    """The sentence that is hidden."""
    return f"The special magic number for {key} is {value}."


def build(
    tokenizer: Tokenizer,
    filler: Filler,
    *,
    length: int,
    depth: float,
    distractors: int,
    form: str,
    source: random.Random,
) -> Haystack:
    """A prompt that leaves ``ANSWER_TOKENS`` of ``length``.

    Values are random numbers of seven digits, keys random names.

    Args:
        depth: Where the asked sentence stands (0: first, 1: last).
        distractors: So many more names and numbers stand at random places.

    Raises:
        UsageError: The sentences alone do not fit.
    """
    keys = source.sample(_NAMES, distractors + 1)
    values = [str(value) for value in source.sample(range(1_000_000, 10_000_000), distractors + 1)]
    hidden = [statement(key, value) for key, value in zip(keys, values, strict=True)]
    room = length - ANSWER_TOKENS - len(_prompt(tokenizer, " ".join(hidden), keys[0], form))
    spots = [depth, *(source.random() for _ in range(distractors))]
    sentences, sizes = filler.take(max(0, room), source)
    while room >= 0:
        places = [_boundary(sizes, spot) for spot in spots]
        ids = _prompt(tokenizer, _assemble(sentences, hidden, places), keys[0], form)
        if len(ids) <= length - ANSWER_TOKENS:
            before, whole = sum(sizes[: places[0]]), sum(sizes)
            return Haystack(ids, keys[0], values[0], before / whole if whole else 0.0)
        if not sentences:
            break
        sentences, sizes = sentences[:-1], sizes[:-1]
    raise UsageError(
        f"{distractors + 1} hidden numbers, the question and {ANSWER_TOKENS} tokens for the answer do not fit into "
        f"{length:,} tokens: give longer --lengths or fewer --distractors."
    )


def _boundary(sizes: Sequence[int], depth: float) -> int:
    """How many sentences of these sizes come before the place nearest to ``depth``."""
    wanted, before, best = depth * sum(sizes), 0, 0
    for count, size in enumerate(sizes, start=1):
        if abs(before + size - wanted) < abs(before - wanted):
            best = count
        before += size
    return best


def _assemble(sentences: Sequence[str], hidden: Sequence[str], places: Sequence[int]) -> str:
    """The text with each hidden sentence before the sentence of its place (those of one place in their order)."""
    parts: list[str] = []
    for index in range(len(sentences) + 1):
        parts += [needle for needle, place in zip(hidden, places, strict=True) if place == index]
        parts += sentences[index : index + 1]
    return " ".join(parts)


def _prompt(tokenizer: Tokenizer, text: str, key: str, form: str) -> list[int]:
    """The text and the question about ``key`` as token ids."""
    question = f"What is the special magic number for {key}?"
    if form == "message":
        return tokenizer.chat([{"role": "user", "content": f"{text}\n\n{question}"}])
    if form == "text":
        asked = tokenizer.chat([{"role": "user", "content": question}])
        if asked[:1] == [tokenizer.bos_id]:
            return [*asked[:1], *tokenizer.encode(text), *asked[1:]]
        return tokenizer.prompt(text) + asked
    return tokenizer.prompt(f"{text} The special magic number for {key} is")


def prompts(
    tokenizer: Tokenizer,
    text: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    distractors: int,
    form: str,
    seed: int,
) -> dict[tuple[int, float], list[Haystack]]:
    """``trials`` prompts for every length and depth; the same for the same arguments.

    Raises:
        UsageError: As :func:`build` does, and for more distractors than there are names.
    """
    if distractors >= KEYS:
        raise UsageError(f"--distractors is {distractors}; give 0 to {KEYS - 1}.")
    filler = Filler(text, tokenizer)
    return {
        (length, depth): [
            build(
                tokenizer,
                filler,
                length=length,
                depth=depth,
                distractors=distractors,
                form=form,
                source=random.Random(f"{seed} {length} {depth} {trial}"),
            )
            for trial in range(trials)
        ]
        for length in lengths
        for depth in depths
    }


def found(answer: str, value: str) -> bool:
    """Whether the first number of an answer is ``value``."""
    number = re.search(r"[0-9]+", answer)
    return number is not None and number[0] == value


def ask(engine: Engine, ids: list[int], step: int, max_tokens: int) -> str:
    """The greedy answer to a prompt, which is fed ``step`` tokens at a time: what is read back is packed by then."""
    with engine.sequence() as sequence:
        for first in range(0, len(ids) - 1, step):
            engine.prefill(sequence, ids[first : min(first + step, len(ids) - 1)])
    answer = [token.id for token in engine.generate(ids, SamplingParams(max_tokens=max_tokens))]
    return engine.tokenizer.decode(answer)


def evaluate(engine: Engine, kv: str, haystacks: dict[tuple[int, float], list[Haystack]], step: int) -> list[Cell]:
    """A cell for every length and depth, then one for every length over all depths."""
    cells = []
    for (length, depth), trials in haystacks.items():
        correct = sum(found(ask(engine, trial.ids, step, ANSWER_TOKENS), trial.value) for trial in trials)
        cells.append(_cell(kv, length, depth, len(trials), correct))
    return cells + totals(cells)


def totals(cells: Iterable[Cell]) -> list[Cell]:
    """One cell for each format and length, over all depths."""
    sums: dict[tuple[str, int], tuple[int, int]] = {}
    for cell in cells:
        trials, correct = sums.get((cell.kv, cell.length), (0, 0))
        sums[cell.kv, cell.length] = trials + cell.trials, correct + cell.correct
    return [_cell(kv, length, None, trials, correct) for (kv, length), (trials, correct) in sums.items()]


def _cell(kv: str, length: int, depth: float | None, trials: int, correct: int) -> Cell:
    low, high = wilson(correct, trials)
    return Cell(kv, length, depth, trials, correct, correct / trials, low, high)
