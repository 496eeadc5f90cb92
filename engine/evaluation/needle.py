"""Needle in a haystack: one number asked for, hidden in a long text among other such numbers.

The sentences and the question are those that the embedded model was trained on ("The special magic number for NAME is
DIGITS."); with several keys as in RULER (Hsieh et al., 2024), where a model that only looks for a number fails. All
formats get the same prompts, made from one seed, several at a time; prompts are read as decode steps would
(:mod:`.reading`), answers are decoded. Several questions may be about one text, which is read once then: their
sequences share its pages.
"""

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from octo_run.engine import sequence as sequences
from octo_run.engine.engine import Engine
from octo_run.engine.evaluation.reading import REFERENCE, Progress, Reader, check_step, groups, pack, rows_at_once
from octo_run.engine.evaluation.statistics import cluster_error, wilson
from octo_run.engine.kept_prefixes import common_length
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
    """A prompt and the cell that it counts for: its length in tokens, the answer included, and the depth aimed at.

    Questions about one text follow each other and have its number in ``text``.
    """

    length: int
    depth: float
    hay: Haystack
    text: int


@dataclass(frozen=True)
class Cell:
    """How often a format found the number at one length and depth.

    Attributes:
        length: In tokens, the answer included.
        depth: None for all depths together.
        texts: So many texts the questions are about.
        stderr: Of ``recall``; with several questions about a text from the spread between texts (None: there is one).
        low: Lower end of the 95 % Wilson interval of ``recall``; where ``stderr`` says that questions about a text are
            alike, of as many independent questions as would have it.
        high: Its upper end.
        delta: ``recall`` less bf16's.
        delta_stderr: Of ``delta``, paired by question, from the spread between texts (None for fewer than two).
        partial: Not all questions were asked.
    """

    kv: str
    length: int
    depth: float | None
    trials: int
    texts: int
    correct: int
    recall: float
    stderr: float | None
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
    depths: Sequence[float],
    distractors: int,
    form: str,
    source: random.Random,
) -> list[Haystack]:
    """Prompts about one text that leave ``ANSWER_TOKENS`` of ``length``.

    Values are random numbers of seven digits, keys random names.

    Args:
        depths: Where the sentences that are asked for stand (0: first, 1: last).
        distractors: So many more names and numbers stand at random places.

    Returns:
        A prompt for each of the depths.

    Raises:
        UsageError: The sentences alone do not fit.
    """
    asked, count = len(depths), len(depths) + distractors
    keys = source.sample(_NAMES, count)
    values = [str(value) for value in source.sample(range(1_000_000, 10_000_000), count)]
    hidden = [statement(key, value) for key, value in zip(keys, values, strict=True)]

    def prompts_about(text: str) -> list[list[int]]:
        return [_prompt(tokenizer, text, key, form) for key in keys[:asked]]

    room = length - ANSWER_TOKENS - max(map(len, prompts_about(" ".join(hidden))))
    spots = [*depths, *(source.random() for _ in range(distractors))]
    sentences, sizes = filler.take(max(0, room), source)
    while room >= 0:
        places = [_boundary(sizes, spot) for spot in spots]
        found = prompts_about(_assemble(sentences, hidden, places))
        if max(map(len, found)) <= length - ANSWER_TOKENS:
            whole = sum(sizes)
            stand = [sum(sizes[:place]) / whole if whole else 0.0 for place in places[:asked]]
            return list(map(Haystack, found, keys, values, stand))
        if not sentences:
            break
        sentences, sizes = sentences[:-1], sizes[:-1]
    raise UsageError(
        f"{count} hidden numbers, the question and {ANSWER_TOKENS} tokens for the answer do not fit into "
        f"{length:,} tokens: give {' or '.join(['longer --lengths', *_fewer(asked, distractors)])}."
    )


def _fewer(asked: int, distractors: int) -> list[str]:
    """What of the hidden numbers can be left out."""
    return ["fewer --distractors"] * (distractors > 0) + ["a smaller --per-text"] * (asked > 1)


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
    per_text: int = 1,
    distractors: int,
    form: str,
    seed: int,
) -> list[Question]:
    """``questions`` prompts for every length, the depths taking turns; the same for the same arguments.

    They are in the order in which they are asked: what is done at any time has all lengths and depths.

    Args:
        per_text: So many of them are about one text, which has that many numbers more than the distractors.

    Raises:
        UsageError: As :func:`build` does, and for more hidden numbers than there are names.
    """
    if per_text > KEYS:
        raise UsageError(f"--per-text is {per_text}; give 1 to {KEYS}.")
    if distractors > KEYS - per_text:
        raise UsageError(f"--distractors is {distractors}; give 0 to {KEYS - per_text}.")
    filler = Filler(text, tokenizer)
    made: list[Question] = []
    for first in range(0, questions, per_text):
        own = [depths[number % len(depths)] for number in range(first, min(first + per_text, questions))]
        for length in lengths:
            source = random.Random(f"{seed} {length} {own[0]} {first // len(depths)}")
            hays = build(tokenizer, filler, length=length, depths=own, distractors=distractors, form=form,
                         source=source)  # fmt: skip
            number = made[-1].text + 1 if made else 0
            made += [Question(length, depth, hay, number) for depth, hay in zip(own, hays, strict=True)]
    return made


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
        done, to_do = 0, 0
        for number, group in enumerate(groups(self._load, self._others)):
            asked = group[1:] if number else group  # bf16 has answered already
            most = min(engine.plan.shape.chunk for _, engine in asked)
            check_step(self._step, most)
            rows = min(rows_at_once(engine.plan, engine.config) for _, engine in asked)
            readers = {kv: Reader(engine, rows) for kv, engine in asked}
            batches = _batches(self._questions, min(engine.plan.shape.sequences for _, engine in asked))
            to_do = to_do or sum(_tokens(batch) for batch in batches) * (1 + len(self._others))
            yield Progress(done, to_do)
            for batch in batches:
                prompts = [[question.hay.ids for question in about] for about in batch]
                hays = [question.hay for about in batch for question in about]
                answers: dict[str, list[str]] = {}
                for kv, reader in readers.items():
                    for count in _read(reader, prompts, rows, self._step or most):
                        done += count
                        yield Progress(done, to_do)
                    answers[kv] = _answer(reader.engine, [hay.ids for hay in hays])
                right = {kv: self._found.get(kv, []) + [found(text, hay.value)
                              for text, hay in zip(texts, hays, strict=True)]
                         for kv, texts in answers.items()}  # fmt: skip
                self._found = {**self._found, **right}
                yield Progress(done, to_do)
            readers.clear()

    def cells(self) -> list[Cell]:
        """For each format a cell for every length and depth, then one for every length over all depths."""
        reference = self._found.get(REFERENCE, [])
        return [cell for kv, found in self._found.items() for cell in cells(kv, self._questions, found, reference)]


def _batches(questions: Sequence[Question], rows: int) -> list[list[list[Question]]]:
    """What is asked at a time: at most ``rows`` questions, those about one text together.

    A text with more questions than that is read again for the next of them.
    """
    batches: list[list[list[Question]]] = []
    room = 0
    for _, own in itertools.groupby(questions, lambda question: question.text):
        left = list(own)
        while left:
            about, left = left[:rows], left[rows:]
            if len(about) > room:
                batches.append([])
                room = rows
            batches[-1].append(about)
            room -= len(about)
    return batches


def _shared(prompts: Sequence[list[int]]) -> int:
    """Tokens that prompts begin with alike; at least one of each is left."""
    first = prompts[0]
    return min(common_length(first, ids[:-1]) for ids in prompts)


def _tokens(batch: Sequence[Sequence[Question]]) -> int:
    """Tokens that a format reads for a batch."""
    count = 0
    for about in batch:
        prompts = [question.hay.ids for question in about]
        count += sum(len(ids) - 1 for ids in prompts) - (len(prompts) - 1) * _shared(prompts)
    return count


def _read(reader: Reader, texts: Sequence[Sequence[list[int]]], rows: int, step: int) -> Iterator[int]:
    """Read prompts, but for their last tokens, so that the cache has them; yields numbers of tokens.

    Args:
        texts: The prompts about each text. What they begin with alike is read once.
    """
    table = reader.engine.arena.table
    opened = [reader.engine.sequence() for _ in texts]
    try:
        yield from _feed(reader, opened, [prompts[0][: _shared(prompts)] for prompts in texts], rows, step)
        with torch.inference_mode():
            for prompts in texts:
                opened += [table.open(ids) for ids in prompts[1:]]
        wanted = [*(prompts[0] for prompts in texts), *(ids for prompts in texts for ids in prompts[1:])]
        left = [ids[len(sequence) : -1] for ids, sequence in zip(wanted, opened, strict=True)]
        yield from _feed(reader, opened, left, rows, step)
    finally:
        for sequence in opened:
            sequence.close()


def _feed(
    reader: Reader, opened: Sequence[sequences.Sequence], texts: Sequence[list[int]], rows: int, step: int
) -> Iterator[int]:
    """Read texts behind what their sequences hold; yields numbers of tokens."""
    for pieces in pack([len(ids) for ids in texts], rows, step):
        yield len(reader.read(opened, texts, pieces))


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
        own = [(question, right, exact) for question, right, exact in asked
               if question.length == length and depth in (None, question.depth)]  # fmt: skip
        if own:
            made.append(_cell(kv, length, depth, own, partial))
    return made


def heat_map(cells: Sequence[Cell], kv: str) -> tuple[list[int], list[float], list[list[float]]]:
    """Lengths, depths, and the recall for each depth and length; NaN where nothing was asked."""
    own = {(cell.depth, cell.length): cell.recall for cell in cells if cell.kv == kv and cell.depth is not None}
    lengths = sorted({length for _, length in own})
    depths = sorted({depth for depth, _ in own if depth is not None})
    return lengths, depths, [[own.get((depth, length), math.nan) for length in lengths] for depth in depths]


def _cell(kv: str, length: int, depth: float | None, own: Sequence[tuple[Question, bool, bool]], partial: bool) -> Cell:
    """A cell of what a format and bf16 found."""
    count, correct = len(own), sum(right for _, right, _ in own)
    recall, texts = correct / count, [question.text for question, _, _ in own]
    stderr: float | None = math.sqrt(recall * (1 - recall) / count)
    alike: float = count
    if len(set(texts)) < count:
        stderr = cluster_error([right for _, right, _ in own], texts)
        if stderr:
            alike = min(count, recall * (1 - recall) / stderr**2)
    low, high = wilson(recall * alike, alike)
    changes = [right - exact for _, right, exact in own]
    return Cell(kv, length, depth, count, len(set(texts)), correct, recall, stderr, low, high, sum(changes) / count,
                cluster_error(changes, texts), partial)  # fmt: skip
