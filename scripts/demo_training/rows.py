"""Training rows: windows of plain text, packed dialogues, and texts with hidden sentences to be asked for."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from demo_training.texts import BOS, END, SPECIAL_IDS, TURN, Corpus, Ids

Weights = npt.NDArray[np.float32]
Segment = tuple[Ids, float]

KINDS = ("plain", "chat", "needle")
#: Loss weights: of a hidden sentence (its number cannot be known), of the asked value in an answer.
HIDDEN_WEIGHT, VALUE_WEIGHT = 0.0, 4.0
_SYSTEM_SHARE, _BEGIN_SHARE, _PHRASE_SHARE = 0.4, 0.5, 0.2
_SHORTEST = 256  # tokens of a needle text
# fmt: off
_NAMES = (
    "Aaron", "Agnes", "Albert", "Amos", "Anton", "Beatrice", "Bernard", "Boris", "Caleb", "Cecilia", "Conrad", "Cyrus",
    "Diana", "Dorothy", "Edgar", "Eleanor", "Enid", "Ernest", "Eva", "Flora", "Frank", "Gilbert", "Greta", "Harold",
    "Hilda", "Ida", "Isaac", "Jonas", "Judith", "Kate", "Leonard", "Louisa", "Lucas", "Mabel", "Max", "Miriam", "Noah",
    "Olga", "Oscar", "Otto", "Philip", "Rebecca", "Rupert", "Ruth", "Silas", "Stella", "Theodore", "Ursula", "Vera",
    "Wilfred",
)
_WORDS = (
    "amber", "anchor", "basket", "bridge", "candle", "copper", "desert", "ember", "feather", "forest", "garden",
    "hammer", "harbour", "island", "ivory", "kettle", "lantern", "marble", "meadow", "mirror", "needle", "orchard",
    "paper", "pepper", "quartz", "river", "saddle", "silver", "stone", "thunder", "valley", "velvet", "window",
)
_SYLLABLES = (
    "ba", "bel", "cor", "da", "del", "fa", "gan", "ha", "jo", "ka", "lin", "lo", "ma", "mir", "na", "nor", "pa", "ra",
    "ro", "sa", "sel", "ta", "tor", "va", "vin", "ya", "zo",
)
# fmt: on


@dataclass(frozen=True)
class Batch:
    """Rows of one length.

    Attributes:
        ids: int64 ``[rows, n + 1]``.
        weights: Of the loss, float32 ``[rows, n]``, of the tokens after the first.
        kinds: Indices into ``KINDS``, int64 ``[rows]``.
    """

    ids: npt.NDArray[np.int64]
    weights: Weights
    kinds: npt.NDArray[np.int64]


def row_counts(rows: int, mix: tuple[float, float, float], has_chats: bool) -> tuple[int, int, int]:
    """How many of ``rows`` rows are of each kind; a kind with a share has at least one row where there are three."""
    chat = 0 if mix[1] == 0 or not has_chats else max(int(rows >= 3), round(rows * mix[1] / sum(mix)))
    needle = 0 if mix[2] == 0 else max(int(rows >= 3), round(rows * mix[2] / sum(mix)))
    return rows - chat - needle, chat, needle


class Rows:
    """Draws batches; the same seed draws the same ones."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self._corpus = corpus
        self._random = np.random.default_rng(seed)

    def batch(self, length: int, counts: tuple[int, int, int]) -> Batch:
        """``counts`` rows of each kind, ``length`` + 1 tokens each (half of them begin with ``<s>``)."""
        makers = (self._plain, self._chat, self._needle)
        rows = [self._row(makers[kind](length + 1), length) for kind, n in enumerate(counts) for _ in range(n)]
        ids, weights = (np.stack(parts) for parts in zip(*rows, strict=True))
        kinds = np.repeat(np.arange(len(KINDS)), counts)
        return Batch(ids.astype(np.int64), weights[:, 1:].astype(np.float32), kinds)

    def _row(self, segments: list[Segment], length: int) -> tuple[Ids, Weights]:
        if self._random.random() < _BEGIN_SHARE:
            segments = [(np.array([BOS], dtype=np.uint16), 1.0), *segments]
        ids = np.concatenate([ids for ids, _ in segments])
        weights = np.concatenate([np.full(len(ids), weight, dtype=np.float32) for ids, weight in segments])
        return ids[: length + 1], weights[: length + 1]

    def _plain(self, count: int) -> list[Segment]:
        start = int(self._random.integers(len(self._corpus.plain) - count + 1))
        return [(self._corpus.plain[start : start + count], 1.0)]

    def _chat(self, count: int) -> list[Segment]:
        """Random dialogues, two fifths of them (that have none) behind a system message."""
        segments: list[Segment] = []
        while count > 0:
            place = int(self._random.integers(len(self._corpus.chats)))
            if not self._corpus.has_system[place] and self._random.random() < _SYSTEM_SHARE:
                system = self._corpus.systems[int(self._random.integers(len(self._corpus.systems)))]
                segments.append((system, 1.0))
                count -= len(system)
            segments.append((self._corpus.chats[place], 1.0))
            count -= len(self._corpus.chats[place])
        return segments

    def _needle(self, count: int) -> list[Segment]:
        """Needle samples of random lengths, and plain text where none fits any more."""
        segments: list[Segment] = []
        while count >= _SHORTEST:
            sample = self._sample(int(self._random.integers(_SHORTEST, count + 1)))
            segments += sample
            count -= sum(len(ids) for ids, _ in sample)
        return segments + (self._plain(count) if count > 0 else [])

    def _sample(self, count: int) -> list[Segment]:
        """About ``count`` tokens: text with 1 to 5 hidden sentences, and questions about up to three of them.

        The text stands before the first question's message, or inside it, or a sentence is to be completed.
        """
        hidden = [self._fact() for _ in range(int(self._random.integers(1, 6)))]
        asked = [hidden[i] for i in self._random.permutation(len(hidden))[:3]]
        form = self._random.choice(["text", "message", "raw"], p=[0.55, 0.35, 0.1])
        facts = [self._corpus.ids(f" {start} {value}.") for start, value, _ in hidden]
        tail: list[Segment] = []
        if form == "raw":
            tail += self._answer(" " + asked[0][0], asked[0][1])
        else:
            for turn, (start, value, question) in enumerate(asked):
                lead = "\n\n" if form == "message" and turn == 0 else f"{TURN}user\n"
                tail.append((self._corpus.ids(f"{lead}{question}{END}\n{TURN}assistant\n"), 1.0))
                tail += self._answer(start, value)
                tail.append((self._corpus.ids(f"{END}\n"), 1.0))
        head = [(self._corpus.ids(f"{TURN}user\n"), 1.0)] if form == "message" else []
        room = count - sum(len(ids) for ids, _ in head + tail) - sum(map(len, facts))
        return head + self._hide(facts, max(0, room)) + tail

    def _fact(self) -> tuple[str, str, str]:
        """A statement up to its value, the value, and the question for it."""
        if self._random.random() < 0.5:
            name = str(self._random.choice(_NAMES))
        else:
            name = "".join(self._random.choice(_SYLLABLES, int(self._random.integers(2, 4)))).capitalize()
        if self._random.random() < _PHRASE_SHARE:
            kind, value = "phrase", " ".join(self._random.choice(_WORDS, 2, replace=False))
        else:
            digits = int(self._random.integers(4, 8))
            kind, value = "number", str(self._random.integers(10 ** (digits - 1), 10**digits))
        topic = f"special magic {kind} for {name}"
        return f"The {topic} is", value, f"What is the {topic}?"

    def _answer(self, start: str, value: str) -> list[Segment]:
        """The answer sentence, its value weighted."""
        whole, known = self._corpus.ids(f"{start} {value}."), len(self._corpus.ids(start))
        return [(whole[:known], 1.0), (whole[known:-1], VALUE_WEIGHT), (whole[-1:], 1.0)]

    def _hide(self, facts: list[Ids], room: int) -> list[Segment]:
        """Plain text of at most ``room`` tokens, in which the facts stand behind random sentences."""
        room = min(room, len(self._corpus.plain))
        start = int(self._random.integers(len(self._corpus.plain) - room + 1))
        text = self._corpus.plain[start : start + room]
        text = text[text >= SPECIAL_IDS]
        ends = np.flatnonzero(self._corpus.stops[text]) + 1
        places = np.sort(self._random.choice(ends if len(ends) else np.array([0]), len(facts)))
        segments, done = list[Segment](), 0
        for fact, place in zip(facts, places, strict=True):
            segments += [(text[done:place], 1.0), (fact, HIDDEN_WEIGHT)]
            done = int(place)
        return [*segments, (text[done:], 1.0)]
