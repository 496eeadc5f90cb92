"""What an answer must be: a JSON schema, a regular expression or a grammar, followed token by token.

The work is done by llguidance (an optional part: ``pip install "octo-run[grammar]"``). For each token it says which
ones may come next, as one bit for each token of the vocabulary. That is computed on the host while the device computes
the step whose logits the bits are for, so a GPU hardly waits for it.
"""

from __future__ import annotations

import json
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from octo_run.errors import OctoError, UsageError, expect, quoted, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octo_run.tokenizer import Tokenizer

Kind = Literal["json", "regex", "lark", "gbnf"]
#: Characters of a grammar at most.
LONGEST = 1 << 20
_BITS = 32
_INSTALL = 'grammars need llguidance: pip install "octo-run[grammar]".'
_NAMES = {"json": "JSON schema", "regex": "regular expression", "lark": "grammar", "gbnf": "grammar"}


@dataclass(frozen=True)
class Grammar:
    """What an answer must be.

    Attributes:
        kind: ``json`` (a JSON schema), ``regex``, ``lark`` (as llguidance reads it) or ``gbnf`` (llama.cpp's).

    Raises:
        UsageError: No such kind, or a text that is none of this kind.
        OctoError: llguidance is not installed.
    """

    kind: Kind
    text: str

    def __post_init__(self) -> None:
        expect("kind", self.kind, str)
        expect("text", self.text, str)
        if self.kind not in _NAMES:
            raise UsageError(f"There is no grammar of kind {quoted(self.kind)}; the kinds are {', '.join(_NAMES)}.")
        if len(self.text) > LONGEST:
            raise UsageError(f"The {_NAMES[self.kind]} has {len(self.text):,} characters; give {LONGEST:,} at most.")
        library = _library()
        try:
            problem = library.LLMatcher.validate_grammar(self.compiled)
        except (UsageError, KeyboardInterrupt):
            raise
        except BaseException as error:  # a panic of Rust's is no Exception
            problem = str(error)
        if problem:
            raise UsageError(f"The {_NAMES[self.kind]} cannot be used: {shown(_flat(problem), 200)}.")

    @property
    def name(self) -> str:
        """What its kind is called."""
        return _NAMES[self.kind]

    @property
    def compiled(self) -> str:
        """The grammar as llguidance takes it."""
        matcher = _library().LLMatcher
        if self.kind == "json":
            try:
                schema = json.loads(self.text)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"The JSON schema is no JSON: {shown(_flat(str(error)), 120)}.") from None
            if not isinstance(schema, (dict, bool)):
                raise UsageError(f"The JSON schema is {quoted(schema)}; give an object.")
            return str(matcher.grammar_from_json_schema(json.dumps(schema), defaults=_JSON_DEFAULTS))
        if self.kind == "regex":
            return str(matcher.grammar_from_regex(self.text))
        if self.kind == "gbnf":
            from llguidance.gbnf_to_lark import gbnf_to_lark

            return str(matcher.grammar_from_lark(gbnf_to_lark(self.text)))
        return str(matcher.grammar_from_lark(self.text))


#: Between the parts of a document a model may write one space, no endless blanks.
_JSON_DEFAULTS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise OctoError(_INSTALL) from None
    return llguidance


def _flat(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


#: Vocabularies as llguidance knows them, made once for each tokenizer.
_vocabularies: weakref.WeakKeyDictionary[Tokenizer, Any] = weakref.WeakKeyDictionary()


class _Vocabulary:
    """A vocabulary as ``TokenizerWrapper`` takes it."""

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        self.eos_token_id, self.bos_token_id = end, tokenizer.bos_id
        special = tokenizer.special_ids
        self.special_token_ids = sorted(special)
        self.tokens = [
            f"<special {token}>".encode() if token in special else tokenizer.piece(token)
            for token in range(tokenizer.vocab_size)
        ]
        self._encode = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


class Guide:
    """Follows one answer: which tokens may come next. A thought that it begins with is free.

    Attributes:
        seconds: What was spent so far.
        count: Masks that were made.
    """

    def __init__(
        self,
        grammar: Grammar,
        tokenizer: Tokenizer,
        end_ids: frozenset[int],
        prompt: Sequence[int] = (),
        answer: Sequence[int] = (),
    ) -> None:
        """Begin an answer, or go on with one.

        Args:
            prompt: The ids before it.
            answer: Its ids so far.

        Raises:
            UsageError: A tokenizer without a token that ends an answer.
            OctoError: The grammar does not allow the answer so far.
        """
        if not end_ids:
            raise UsageError("This model has no token that ends an answer, so no grammar can be followed.")
        library = _library()
        self._ends, self._piece = end_ids, tokenizer.piece
        if tokenizer not in _vocabularies:
            wrapper = library.TokenizerWrapper(_Vocabulary(tokenizer, min(end_ids)))
            _vocabularies[tokenizer] = library.LLTokenizer(wrapper, n_vocab=tokenizer.vocab_size)
        self._matcher = library.LLMatcher(_vocabularies[tokenizer], grammar.compiled, log_level=0)
        self._bits = torch.zeros(-(-tokenizer.vocab_size // _BITS), dtype=torch.int32)
        self.seconds, self.count = 0.0, 0
        self._thought: _Thought | None = _Thought(tokenizer, prompt)
        self._begun = True  # otherwise what sets a thought off may come
        for token in answer:
            self._thought.advance(token)
        self._leave_thought()

    def advance(self, token: int) -> None:
        """The next token of the answer is this one.

        Raises:
            OctoError: The grammar does not allow it.
        """
        if self._thought is None:
            self._follow(token)
        else:
            self._thought.advance(token)
            self._leave_thought()

    def _leave_thought(self) -> None:
        """If the thought is over, follow what was said since."""
        thought = self._thought
        if thought is not None and thought.over:
            self._thought, self._begun = None, not thought.was
            for token in thought.said:
                self._follow(token)

    def _follow(self, token: int) -> None:
        sets_off = not self._begun and token not in self._ends and not self._piece(token).strip()
        if sets_off and not self._matcher.validate_tokens([token]):
            return
        self._begun = True
        self._consume(token)

    def _consume(self, token: int) -> None:
        if token not in self._ends and not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._check()

    def fill(self, bits: Tensor) -> None:
        """Set the bits of the tokens that may come next, those that end the answer included if it may end.

        Args:
            bits: int32 on the host, with a bit for each row of the model's vocabulary.
        """
        begun = time.perf_counter()
        if self._thought is not None:
            bits.fill_(-1)
            return
        bits.zero_()
        if not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(self._bits.data_ptr(), self._bits.nbytes)
            self._check()
            bits[: len(self._bits)] = self._bits
        if self._matcher.is_stopped() or self._matcher.is_accepting():
            for token in self._ends:
                place = bits[token // _BITS]
                place |= _signed_bit(token % _BITS)
        self.seconds += time.perf_counter() - begun
        self.count += 1

    def _check(self) -> None:
        if self._matcher.is_error():
            why = _flat(self._matcher.get_error().partition("<state>")[0])
            raise OctoError(f"The grammar cannot be followed here: {shown(why, 240)}.")


class _Thought:
    """Follows an answer while it is, or may be, in a thought.

    Attributes:
        over: Whether what comes next is said.
        was: Whether there was a thought.
        said: The ids of what was said behind the last thought.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer, self._division = tokenizer, tokenizer.thinking.division(prompt)
        self._stream = tokenizer.stream(prompt)
        self.over = not self._division.thinking
        self.was, self.said = not self.over, list[int]()

    def advance(self, token: int) -> None:
        """Take the next token. A mark that is text may end inside it."""
        special, before = token in self._tokenizer.special_ids, self.over
        text = self._tokenizer.decode([token], skip_special=False) if special else self._stream.push(token)
        pieces = self._division.special(text) if special else self._division.text(text)
        parts = self._division.give(pieces)[1]
        self.over = not self._division.thinking and not self._division.between
        if not self.over:
            self.was, self.said = True, []
        elif before:
            self.said.append(token)
        else:
            text = "".join(part for thought, part in parts if not thought)
            self.said = self._tokenizer.encode(text) if text.strip() else []


def _signed_bit(number: int) -> int:
    return 1 << number if number < _BITS - 1 else -(1 << (_BITS - 1))
