"""The streaming detokenizer: whole characters only, and the same text as decoding at once."""

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from octo_run.tokenizer import StreamingDetokenizer, Tokenizer, load_tokenizer

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=60),
    st.text("👩‍👩‍👧‍👦🦙🏳️‍🌈é́ñ你好世界の한글ไทย\u0301\u200d ab\n\t", max_size=40),
)


@pytest.fixture(scope="module", params=["demo", "llama2", "qwen2"])
def tok(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


def stream_all(tok: Tokenizer, ids: list[int], *, skip_special: bool = True) -> list[str]:
    stream = tok.stream(skip_special=skip_special)
    return [*(stream.push(i) for i in ids), stream.finish()]


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_streamed_text_grows_to_the_text(tok: Tokenizer, text: str) -> None:
    """Qwen2 normalises to NFC, SentencePiece writes U+2581 for the space; else every step is a prefix of the text."""
    text = unicodedata.normalize("NFC", text.replace("▁", " "))
    pieces = stream_all(tok, tok.encode(text))
    assert pieces[-1] == ""
    assert "".join(pieces) == text


@pytest.mark.few(1)
@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip_special=st.booleans())
def test_streamed_ids_equal_decoded_ids(tok: Tokenizer, data: st.DataObject, skip_special: bool) -> None:
    few = st.sampled_from([0, 1, 2, 3, 4, *range(5, 262)])
    ids = data.draw(st.lists(st.one_of(few, st.integers(0, tok.vocab_size + 5)), max_size=30))
    whole = "".join(stream_all(tok, ids, skip_special=skip_special))
    assert whole == tok.decode(ids, skip_special=skip_special)
    joined = b"".join(tok._piece(i) for i in ids if not (skip_special and i in tok.special_ids))
    assert whole in (joined.decode("utf-8", "replace"), joined.removeprefix(b" ").decode("utf-8", "replace"))


@settings(max_examples=300, deadline=None)
@given(chunks=st.lists(st.binary(max_size=5), max_size=20))
def test_replacement_comes_exactly_when_certain(chunks: list[bytes]) -> None:
    """After each piece the text is what is certain: all of it, less an end that may still become a character."""
    stream = StreamingDetokenizer(chunks.__getitem__, frozenset(), strip_space=False)
    seen, text = b"", ""
    for i, chunk in enumerate(chunks):
        text += stream.push(i)
        seen += chunk
        held = next((n for n in range(4) if may_continue(seen[len(seen) - n :]) and n <= len(seen)), 0)
        assert text == certain(seen)
        assert held <= 3
    assert text + stream.finish() == seen.decode("utf-8", "replace")


def may_continue(tail: bytes) -> bool:
    """Whether `tail` is a proper beginning of one character's bytes."""
    try:
        tail.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False


def certain(data: bytes) -> str:
    held = next((n for n in (3, 2, 1) if n <= len(data) and may_continue(data[len(data) - n :])), 0)
    return data[: len(data) - held].decode("utf-8", "replace")


def byte_ids(data: bytes) -> list[int]:
    """The demo model's byte tokens."""
    return [5 + byte for byte in data]


def test_byte_tokens_of_the_demo_model(demo: Tokenizer) -> None:
    assert demo.decode(byte_ids(b"\n")) == "\n"
    assert stream_all(demo, byte_ids("你🦙".encode())) == ["", "", "你", "", "", "", "🦙", ""]
    letter = demo.encode("a")[0]
    assert stream_all(demo, [*byte_ids(b"\xe4\xbd"), letter]) == ["", "", "\ufffda", ""]
    assert stream_all(demo, byte_ids(b"\xf0\x80")) == ["", "\ufffd\ufffd", ""]
    assert stream_all(demo, byte_ids(b"\xff\xe4\xbd")) == ["\ufffd", "", "", "\ufffd"]


def test_spaces_of_the_demo_model_stay(demo: Tokenizer) -> None:
    """It puts no space before the text, so none is taken away: an answer may begin with one."""
    ids = demo.encode("  two spaces\n")
    assert "".join(stream_all(demo, ids)) == "  two spaces\n"


def test_special_tokens_in_the_stream(demo: Tokenizer) -> None:
    ids = [3, *demo.encode("user"), 4]
    assert "".join(stream_all(demo, ids)) == "user"
    assert "".join(stream_all(demo, ids, skip_special=False)) == "<|im_start|>user<|im_end|>"


def test_the_prefix_space_is_taken_away_once(llama2: Tokenizer) -> None:
    assert stream_all(llama2, [1, 15043, 15043]) == ["", "Hello", " Hello", ""]
    assert "".join(stream_all(llama2, llama2.encode("  x"))) == "  x"


def test_a_model_that_removes_extra_spaces(spm_model: Callable[..., bytes], tmp_path: Path) -> None:
    """SentencePiece then drops one space of each token until there is text, with a pause between two answers too."""
    (tmp_path / "tokenizer.model").write_bytes(spm_model(user_defined_symbols=["\u2581\u2581"]))
    tok = load_tokenizer(tmp_path)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    space, two, dog = (sp.piece_to_id(piece) for piece in ("\u2581", "\u2581\u2581", "\u2581dog"))
    for ids in ([space] * 6 + [dog, dog], [two, dog], [space, two, space, dog, space], [dog] + [space] * 4):
        text = sp.decode(ids)
        assert tok.decode(ids) == text
        for cut in range(len(ids) + 1):
            after = tok.stream(ids[:cut])
            assert tok.decode(ids[:cut]) + "".join(map(after.push, ids[cut:])) == text
