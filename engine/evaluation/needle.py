"""Needle in a haystack: one number asked for, hidden in a long text among other such numbers.

The sentences and the question are those that the embedded model was trained on ("The special magic number for NAME is
DIGITS."); with several keys as in RULER (Hsieh et al., 2024), where a model that only looks for a number fails. All
formats get the same prompts, made from one seed, several at a time; prompts are read as decode steps would
(:mod:`.reading`), answers are decoded.
"""

import math
import random
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from octo_run.engine.engine import Engine
from octo_run.engine.evaluation.reading import REFERENCE, Progress, Reader, groups, pack, rows_at_once
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
class Question:
    """A prompt and the cell that it counts for: its length in tokens, the answer included, and the depth aimed at."""

    length: int
    depth: float
    hay: Haystack


@dataclass(frozen=True)
class Cell:
    """How often a format found the number at one length and depth.

    Attributes:
        length: In tokens, the answer included.
        depth: None for all depths together.
        stderr: Of ``recall``.
        low: Lower end of the 95 % Wilson interval of ``recall``.
        high: Its upper end.
        delta: ``recall`` less bf16's.
        delta_stderr: Of ``delta`` (paired by question; None for fewer than two).
        partial: Not all questions were asked.
    """

    kv: str
    length: int
    depth: float | None
    trials: int
    correct: int
    recall: float
    stderr: float
    low: float
    high: float
    delta: float
    delta_stderr: float | None
    partial: bool = False


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
    questions: int,
    distractors: int,
    form: str,
    seed: int,
) -> list[Question]:
    """``questions`` prompts for every length, the depths taking turns; the same for the same arguments.

    They are in the order in which they are asked: what is done at any time has all lengths and depths.

    Raises:
        UsageError: As :func:`build` does, and for more distractors than there are names.
    """
    if distractors >= KEYS:
        raise UsageError(f"--distractors is {distractors}; give 0 to {KEYS - 1}.")
    filler = Filler(text, tokenizer)
    found = []
    for number in range(questions):
        trial, place = divmod(number, len(depths))
        for length in lengths:
            source = random.Random(f"{seed} {length} {depths[place]} {trial}")
            hay = build(tokenizer, filler, length=length, depth=depths[place], distractors=distractors, form=form,
                        source=source)  # fmt: skip
            found.append(Question(length, depths[place], hay))
    return found


def found(answer: str, value: str) -> bool:
    """Whether the first number of an answer is ``value``."""
    number = re.search(r"[0-9]+", answer)
    return number is not None and number[0] == value


class Search:
    """``bf16`` and other formats asked the same questions, as :class:`.perplexity.Comparison` compares them."""

    def __init__(
        self, load: Callable[[str], Engine], kvs: Sequence[str], questions: Sequence[Question], step: int | None = None
    ) -> None:
        """Load nothing yet.

        Args:
            load: Gives the engine of a format, with room for the longest question and as many sequences as questions
                are to be asked at a time. The search closes the engines of the formats other than ``bf16``.
            step: Tokens of a prompt read at once (None: as many as a chunk has). It makes no difference.
        """
        self._load, self._questions, self._step = load, questions, step
        self._others = [kv for kv in dict.fromkeys(kvs) if kv != REFERENCE]
        #: Whether each format found the number, for the questions that it was asked so far.
        self._found: dict[str, list[bool]] = {}

    def run(self) -> Iterator[Progress]:
        """Ask; tells how far it is whenever a format has read some tokens.

        Raises:
            UsageError: A step that is too long.
            OctoError: Logits that are not finite.
        """
        whole = sum(len(question.hay.ids) - 1 for question in self._questions)
        done, to_do = 0, whole * (1 + len(self._others))
        for number, group in enumerate(groups(self._load, self._others)):
            asked = group[1:] if number else group  # bf16 has answered already
            most = min(engine.plan.shape.chunk for _, engine in asked)
            if self._step is not None and not 1 <= self._step <= most:
                raise UsageError(f"--step is {self._step}; give 1 to {most} tokens.")
            rows = min(rows_at_once(engine.plan, engine.config) for _, engine in asked)
            readers = {kv: Reader(engine, rows) for kv, engine in asked}
            at_once = min(engine.plan.shape.sequences for _, engine in asked)
            yield Progress(done, to_do)
            for first in range(0, len(self._questions), at_once):
                batch = [question.hay for question in self._questions[first : first + at_once]]
                answers: dict[str, list[str]] = {}
                for kv, reader in readers.items():
                    for count in _read(reader, [hay.ids for hay in batch], rows, self._step or most):
                        done += count
                        yield Progress(done, to_do)
                    answers[kv] = _answer(reader.engine, [hay.ids for hay in batch])
                right = {kv: self._found.get(kv, []) + [found(text, hay.value)
                              for text, hay in zip(texts, batch, strict=True)]
                         for kv, texts in answers.items()}  # fmt: skip
                self._found = {**self._found, **right}
                yield Progress(done, to_do)
            readers.clear()

    def cells(self) -> list[Cell]:
        """For each format a cell for every length and depth, then one for every length over all depths."""
        reference = self._found.get(REFERENCE, [])
        return [cell for kv, found in self._found.items() for cell in cells(kv, self._questions, found, reference)]


def _read(reader: Reader, prompts: Sequence[list[int]], rows: int, step: int) -> Iterator[int]:
    """Read prompts, but for their last tokens, so that the cache has them; yields numbers of tokens."""
    opened = [reader.engine.sequence() for _ in prompts]
    try:
        for pieces in pack([len(ids) - 1 for ids in prompts], rows, step):
            yield len(reader.read(opened, prompts, pieces))
    finally:
        for sequence in opened:
            sequence.close()


def _answer(engine: Engine, prompts: Sequence[list[int]]) -> list[str]:
    """Greedy answers to prompts that the cache has. Afterwards it has nothing."""
    answers = [""] * len(prompts)
    for answer in engine.generate_batch(list(prompts), SamplingParams(max_tokens=ANSWER_TOKENS)):
        assert answer.reused_tokens == answer.prompt_tokens - 1
        answers[answer.index] = engine.tokenizer.decode(answer.ids)
    for sequence in engine.arena.table.rows:
        if sequence is not None:
            sequence.discard()
    return answers


def cells(kv: str, questions: Sequence[Question], found: Sequence[bool], reference: Sequence[bool]) -> list[Cell]:
    """The cells of a format that was asked the first of the questions, those over all depths last.

    Args:
        found: Whether it found each number.
        reference: Whether bf16 did, at least as many.
    """
    asked = list(zip(questions, found, reference, strict=False))
    partial = len(found) < len(questions)
    places = sorted({(question.length, question.depth) for question in questions})
    lengths = sorted({question.length for question in questions})
    cut: list[tuple[int, float | None]] = [*places, *((length, None) for length in lengths)]
    made = []
    for length, depth in cut:
        own = [(right, exact) for question, right, exact in asked
               if question.length == length and depth in (None, question.depth)]  # fmt: skip
        if own:
            made.append(_cell(kv, length, depth, own, partial))
    return made


def _cell(kv: str, length: int, depth: float | None, own: Sequence[tuple[bool, bool]], partial: bool) -> Cell:
    """A cell of what a format and bf16 found."""
    count, correct = len(own), sum(right for right, _ in own)
    recall, (low, high) = correct / count, wilson(correct, count)
    changes = [right - exact for right, exact in own]
    delta_stderr = statistics.stdev(changes) / math.sqrt(count) if count > 1 else None
    stderr = math.sqrt(recall * (1 - recall) / count)
    return Cell(kv, length, depth, count, correct, recall, stderr, low, high, statistics.fmean(changes), delta_stderr,
                partial)  # fmt: skip
