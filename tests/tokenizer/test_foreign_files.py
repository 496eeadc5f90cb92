"""Tokenizer files that are damaged, hostile, incomplete, or of another model: one sentence, soon, or the right ids."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from octo_run.errors import LONGEST, OctoError
from octo_run.tokenizer import load_tokenizer
from octo_run.tokenizer.finder import Finder
from octo_run.tokenizer.watch import run_watched

UNICODE = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def tokenizer_json(library: Library, folder: Path, **changes: object) -> Path:
    """Save the library's tokenizer with some keys of its JSON changed; returns the folder."""
    write_json(folder / "tokenizer.json", {**json.loads(library.to_str()), **changes})
    return folder


def transformers_tokenizer(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def one_sentence(folder: Path, text: str = "the dog é") -> str:
    """What loading and using the folder's tokenizer says; fails where it says nothing or throws something else."""
    with pytest.raises(OctoError) as caught:
        tok = load_tokenizer(folder)
        tok.decode(tok.encode(text))
    said = str(caught.value)
    assert said.endswith(".") and len(said) <= LONGEST and said.isprintable()
    return said


# Whatever a parser throws


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"additional_special_tokens": 5}'),
        ("tokenizer_config.json", '{"extra_special_tokens": [[]]}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": [], "template": "x"}]}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", '{"eos_token": "\\ud800"}'),
        ("tokenizer_config.json", '{"eos_token": {"content": "a\\udfff"}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9": {"content": "\\ud83d"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"2147483648": {"content": "<x>"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"' + "9" * 5000 + '": {"content": "<x>"}}}'),
        ("tokenizer_config.json", '{"model_max_length": ' + "9" * 5000 + "}"),
        ("tokenizer_config.json", '{"tokenizer_class": ["LlamaTokenizer"]}'),
        ("tokenizer_config.json", '{"eos_token": "\\u001b]52;c;eA==\\u0007' + "x" * 5000 + '"}'),
        ("added_tokens.json", '{"\\ud800": 9000}'),
        ("added_tokens.json", '{"<x>": 1e400}'),
        ("special_tokens_map.json", '{"eos_token": 7}'),
        ("special_tokens_map.json", "[" * 100_000),
        ("chat_template.jinja", b"\xff"),
        ("config.json", "{"),
    ],
)
def test_a_wrong_side_file_is_one_sentence(tmp_path: Path, demo_dir: Path, name: str, content: str | bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes((demo_dir / "tokenizer.model").read_bytes())
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    one_sentence(tmp_path)


def field(number: int, payload: bytes) -> bytes:
    return bytes([number << 3 | 2, len(payload)]) + payload


@pytest.mark.parametrize(
    "tail",
    [
        field(1, field(1, b"\xff\xfe")),  # a piece that is not UTF-8
        field(1, field(1, b"<0xZZ>") + bytes([3 << 3, 6])),  # a byte that is none
        bytes([9 << 3 | 3, 9 << 3 | 4]),  # a group, which nobody writes any more
        bytes([9 << 3 | 0]) + b"\xff" * 9,  # a number without end
        field(2, b"\x08"),
    ],
)
def test_a_wrong_sentencepiece_field_is_one_sentence_or_harmless(tmp_path: Path, demo_dir: Path, tail: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes((demo_dir / "tokenizer.model").read_bytes() + tail)
    try:
        tok = load_tokenizer(tmp_path)
    except OctoError as error:
        assert "tokenizer.model" in str(error) and len(str(error)) <= LONGEST
    else:
        assert tok.decode(tok.encode("the dog é")) == "the dog é"


@pytest.mark.parametrize(
    ("merges", "prefix"),
    [
        ([["a", "b"]], "##"),
        ([["ab", "ab"]], ""),
        (["ab ab"], None),
        ([["a", "b", "c"]], None),
        (["ab"], None),
        ([["a", 1]], None),
        ([{}], None),
    ],
)
def test_merges_that_make_the_library_panic_are_one_sentence(
    tmp_path: Path, merges: list[object], prefix: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "c": 3}
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "continuing_subword_prefix": prefix}
    assert "merge" in one_sentence(tokenizer_json(Library(models.BPE()), tmp_path, model=model))
    assert capfd.readouterr().err == "", "a panic writes to the terminal by itself"


def test_a_panic_of_a_parser_counts_as_its_file_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panics derive from BaseException; wherever the library throws one, the file is named."""

    class PanicException(BaseException):
        pass

    class Panicking:
        @staticmethod
        def from_str(_: str) -> Library:
            raise PanicException("index out of bounds\x1b[31m")

    library = tokenizer_json(byte_fallback_unigram(), tmp_path)
    tok = load_tokenizer(library)
    monkeypatch.setattr("octo_run.tokenizer.hf.Tokenizer", Panicking)
    assert "tokenizer.json is not valid tokenizer data (index out of bounds" in one_sentence(tmp_path)
    monkeypatch.undo()

    def encode(*_: object, **__: object) -> None:
        raise PanicException("slice")

    monkeypatch.setattr(tok._backend, "_tok", type("Tok", (), {"encode": encode})())
    with pytest.raises(OctoError, match=r"tokenizer\.json is not valid tokenizer data \(slice\)"):
        tok.encode("the")


def test_an_unknown_character_without_an_unknown_token_is_one_sentence(tmp_path: Path) -> None:
    library = Library(models.Unigram([("t", 0.0), ("h", -1.0)], unk_id=None, byte_fallback=False))
    library.decoder = decoders.Fuse()
    assert "tokenizer.json" in one_sentence(tokenizer_json(library, tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"])
def test_a_pipe_or_folder_in_place_of_a_file_is_refused(tmp_path: Path, demo_dir: Path, name: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes((demo_dir / "tokenizer.model").read_bytes())
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert "no regular file" in one_sentence(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert name in one_sentence(tmp_path)


# Limits


def model_json(kind: str, token_id: int) -> dict[str, object]:
    more = {"WordPiece": {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}, "BPE": {"merges": []}}
    return {"type": kind, "vocab": {"a": 0, "b": token_id}, "unk_token": "a", **more.get(kind, {})}


@pytest.mark.parametrize("token_id", [2**22, 2**31, 2**32 - 1, 2**32, 2**64, -1, 1.5, True, None])
@pytest.mark.parametrize("kind", ["BPE", "WordLevel", "WordPiece", "added", "vocab.json"])
def test_an_id_that_no_vocabulary_has_is_refused_at_once(tmp_path: Path, kind: str, token_id: object) -> None:
    library = Library(models.WordLevel({"a": 0}, unk_token="a"))
    library.decoder = decoders.Fuse()
    if kind == "vocab.json":
        write_json(tmp_path / "vocab.json", {"a": 0, "b": token_id})
        (tmp_path / "merges.txt").write_text("")
        write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    elif kind == "added":
        if token_id == -1:
            pytest.skip("an added token of -1 is one that is not there")
        tokenizer_json(library, tmp_path, added_tokens=[{"id": token_id, "content": "<x>", "special": True}])
    else:
        tokenizer_json(library, tmp_path, model=model_json(kind, token_id))  # type: ignore[arg-type]
    begun = time.process_time()
    one_sentence(tmp_path)
    assert time.process_time() - begun < 5


@pytest.mark.slow
def test_too_many_and_too_long_added_tokens_are_refused(tmp_path: Path) -> None:
    library = Library(models.WordLevel({"a": 0}, unk_token="a"))
    library.decoder = decoders.Fuse()
    long = [{"id": 1, "content": "x" * 513, "special": True}]
    assert "513 characters" in one_sentence(tokenizer_json(library, tmp_path, added_tokens=long))
    many = [{"id": i, "content": f"<{i}>", "special": True} for i in range(1, 2 + (1 << 17))]
    assert "131,072" in one_sentence(tokenizer_json(library, tmp_path, added_tokens=many))


@pytest.mark.slow
def test_thirty_thousand_added_tokens_load_soon(tmp_path: Path) -> None:
    library = Library(models.WordLevel({"a": 0}, unk_token="a"))
    library.decoder = decoders.Fuse()
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": f"{i}<custom>", "special": i % 2 == 0, **flags} for i in range(1, 30_001)]
    begun = time.process_time()
    tok = load_tokenizer(tokenizer_json(library, tmp_path, added_tokens=added))
    assert tok.encode("30000<custom>29999<custom>", allow_special=True) == [30_000, 29_999]
    assert time.process_time() - begun < 5


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=6),
    text=st.text("ab<> ", max_size=30),
)
def test_the_finder_finds_what_a_regular_expression_finds(texts: list[str], text: str) -> None:
    import re

    pattern = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
    assert list(Finder(texts).all(text)) == [match.span() for match in pattern.finditer(text)]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
def test_a_regular_expression_that_does_not_end_is_given_up(
    tmp_path: Path, make_library: Callable[[str], Library], part: str
) -> None:
    """In a process of its own, which must come to its end too."""
    library = make_library("byte-level")
    if part == "pre_tokenizer":
        split = pre_tokenizers.Split(Regex("(a|aa)+$"), "isolated")
        library.pre_tokenizer = pre_tokenizers.Sequence([split, library.pre_tokenizer])
    else:
        library.normalizer = normalizers.Replace(Regex("(a|aa)+$"), "a")
    tokenizer_json(library, tmp_path)
    code = (
        "import sys, pathlib; from octo_run.errors import OctoError; from octo_run.tokenizer import load_tokenizer\n"
        f"tok = load_tokenizer(pathlib.Path({str(tmp_path)!r}))\n"
        "assert tok.decode(tok.encode('the dog')) == 'the dog'\n"
        "try: tok.encode(('a' * 28 + '!') * 3000)\n"
        "except OctoError as error: print(error)"
    )
    begun = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "does not come to an end with this text" in done.stdout and "tokenizer.json" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begun < 8  # seconds of its own, start included


def test_a_regular_expression_that_the_library_gives_up_is_one_sentence(
    tmp_path: Path, make_library: Callable[[str], Library]
) -> None:
    library = make_library("byte-level")
    split = pre_tokenizers.Split(Regex("(a+)+b"), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([split, library.pre_tokenizer])
    assert "tokenizer.json is not valid" in one_sentence(tokenizer_json(library, tmp_path), "a" * 200 + "!cb")


def test_watched_work_gives_its_result_or_error_or_is_left_behind() -> None:
    assert run_watched(lambda: 7, 5) == 7
    with pytest.raises(ZeroDivisionError):
        run_watched(lambda: 1 // 0, 5)
    enough = threading.Event()

    def endless() -> None:
        while not enough.is_set():
            pass

    with pytest.raises(TimeoutError, match="more than 0 seconds"):
        run_watched(endless, 0.2)
    enough.set()


def test_text_does_not_grow_without_end(tmp_path: Path, make_library: Callable[[str], Library]) -> None:
    library = make_library("byte-level")
    library.normalizer = normalizers.Sequence([normalizers.Replace("a", "aaaa")] * 4)
    assert "times as long" in one_sentence(tokenizer_json(library, tmp_path))
    library = make_library("byte-level")
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)] * 12)
    assert "times as long" in one_sentence(tokenizer_json(library, tmp_path))
    library = make_library("metaspace-first")
    library.decoder = decoders.Sequence([decoders.Replace("e", "e" * 500), decoders.Replace("e", "e" * 500)])
    assert "endless" in one_sentence(tokenizer_json(library, tmp_path))


# Refused though right


@pytest.mark.parametrize("name", [None, "PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["byte-level", "metaspace-first"])
def test_a_tokenizer_json_without_a_decoder_decodes_as_in_transformers(
    tmp_path: Path, make_library: Callable[[str], Library], kind: str, family: str, name: str | None
) -> None:
    tokenizer_json(make_library(kind), tmp_path, decoder=None)
    write_json(tmp_path / "config.json", {"model_type": family})
    write_json(tmp_path / "tokenizer_config.json", {} if name is None else {"tokenizer_class": name})
    theirs, ours = transformers_tokenizer(tmp_path), load_tokenizer(tmp_path)
    if kind == "metaspace-first" and type(theirs).__name__ in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        pytest.skip("transformers reads such a file with rules that are not the file's")
    for text in ("the dog, né", "x", "  The quick\n你 fox"):
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids)
        stream = ours.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == theirs.decode(ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family"),
    [
        (None, "qwen2"), (None, "qwen3"), ("Qwen2TokenizerFast", "llama"), ("GPT2Tokenizer", "llama"),
        ("GPT2TokenizerFast", "qwen2"), ("CodeGenTokenizer", "llama"), ("GPTNeoXTokenizerFast", "llama"),
        ("LlamaTokenizer", "qwen2"),
    ],
)  # fmt: skip
def test_vocab_and_merges_alone_encode_as_in_transformers(
    tmp_path: Path, qwen2_dir: Path, name: str | None, family: str
) -> None:
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).write_bytes((qwen2_dir / file).read_bytes())
    write_json(tmp_path / "config.json", {"model_type": family})
    if name is not None:
        write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": name})
    theirs, ours = transformers_tokenizer(tmp_path), load_tokenizer(tmp_path)
    for text in (" I'll the dog123 né\n\n", "e\u0301", "x<|endoftext|>y", "你好 \t "):
        ids = ours.encode(text, allow_special=True)
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))


@pytest.mark.parametrize("name", [None, "PreTrainedTokenizerFast", "MysteryTokenizer"])
def test_vocab_and_merges_that_transformers_refuses_too(tmp_path: Path, qwen2_dir: Path, name: str | None) -> None:
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).write_bytes((qwen2_dir / file).read_bytes())
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    write_json(tmp_path / "tokenizer_config.json", {} if name is None else {"tokenizer_class": name})
    with pytest.raises(Exception, match="Couldn't instantiate"):
        transformers_tokenizer(tmp_path)
    assert "needs the model's tokenizer.json" in one_sentence(tmp_path)


@pytest.mark.parametrize("files", ["tokenizer.model", "tokenizer.json"])
def test_an_added_token_of_minus_one_is_not_there(
    tmp_path: Path, demo_dir: Path, make_library: Callable[[str], Library], files: str
) -> None:
    if files == "tokenizer.model":
        (tmp_path / files).write_bytes((demo_dir / files).read_bytes())
    else:
        tokenizer_json(make_library("byte-level"), tmp_path)
    plain = load_tokenizer(tmp_path)
    write_json(tmp_path / "added_tokens.json", {"[PAD]": -1})
    write_json(
        tmp_path / "tokenizer_config.json",
        {"pad_token": "[PAD]", "added_tokens_decoder": {"-1": {"content": "<none>", "special": True}}},
    )
    tok = load_tokenizer(tmp_path)
    assert tok.vocab_size == plain.vocab_size and tok.special_ids == plain.special_ids
    for text in ("a[PAD]<none>", "the dog"):
        assert tok.encode(text, allow_special=True) == plain.encode(text, allow_special=True)


# Unknown characters


def byte_fallback_unigram() -> Library:
    """A unigram model that spells "</s>", with an unknown piece."""
    words = [("▁the", -2.0), ("▁dog", -2.0), ("▁sleeps", -2.0)]
    letters = [(char, -9.0) for char in "▁thedogslp</>"]
    library = Library(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), *words, *letters], unk_id=0, byte_fallback=False))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    library.decoder = decoders.Metaspace(prepend_scheme="first")
    library.add_special_tokens(["<unk>", "</s>"])
    return library


@pytest.mark.parametrize("config", [None, {}, {"unk_token": None}, {"unk_token": "<unk>"}])
def test_one_unknown_character_changes_no_other_id(tmp_path: Path, config: dict[str, object] | None) -> None:
    library = byte_fallback_unigram()
    tokenizer_json(library, tmp_path)
    if config is not None:
        write_json(tmp_path / "tokenizer_config.json", config)
    tok = load_tokenizer(tmp_path)
    assert tok.encode("the dog sleeps é") == library.encode("the dog sleeps é", add_special_tokens=False).ids
    assert tok.unk_id == 0 and len(tok.encode("the dog sleeps é")) == 5


@pytest.mark.parametrize("config", [None, {"unk_token": None}])
@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel"])
def test_unknown_characters_of_other_models(tmp_path: Path, kind: str, config: dict[str, object] | None) -> None:
    vocabulary = {"<unk>": 0, "the": 1, "dog": 2, "t": 3, "h": 4, "e": 5, "th": 6}
    merges = [("t", "h"), ("th", "e")]
    model = {
        "BPE": lambda: models.BPE(vocabulary, merges, unk_token="<unk>"),
        "WordPiece": lambda: models.WordPiece(vocabulary, unk_token="<unk>"),
        "WordLevel": lambda: models.WordLevel(vocabulary, unk_token="<unk>"),
    }[kind]()
    library = Library(model)
    library.pre_tokenizer, library.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    library.add_special_tokens(["<unk>"])
    tokenizer_json(library, tmp_path)
    if config is not None:
        write_json(tmp_path / "tokenizer_config.json", config)
    tok = load_tokenizer(tmp_path)
    assert tok.encode("the é the") == library.encode("the é the").ids and tok.unk_id == 0


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from(["</s>", "<unk>", "<", "/s>", " ", "the", " dog", "é"]), max_size=8))
def test_a_spelled_special_token_changes_no_other_id(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    library = byte_fallback_unigram()
    tok = load_tokenizer(tokenizer_json(library, tmp_path_factory.mktemp("tok")))
    text = "".join(parts)
    ids = tok.encode(text)
    assert 1 not in ids and (0 in ids) == any(char in text for char in "éunk")
    library.encode_special_tokens = True
    theirs = library.encode(text, add_special_tokens=False)
    kept = [i for i in theirs.ids if i != 1]
    rest = iter(ids)
    assert all(i in rest for i in kept), "their ids in their order, the spelled ones between"


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_spelled_special_token_keeps_the_text(tmp_path: Path, scheme: str) -> None:
    library = byte_fallback_unigram()
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    library.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tok = load_tokenizer(tokenizer_json(library, tmp_path))
    for text in ("the</s>dog", "</s>", "the </s> dog", "</s></s>"):
        ids = tok.encode(text)
        assert 1 not in ids and tok.decode(ids) == text


# A model with fewer rows than the tokenizer has ids


def configs_of(rows: int) -> list[dict[str, object]]:
    """Of a model, and of checkpoints that see, whose text part has the rows."""
    text: dict[str, object] = {"text_config": {"vocab_size": rows}}
    return [{"vocab_size": rows}, text, text | {"vocab_size": 5000}, {"vocab_size": rows, "text_config": {}}]


def test_a_vocabulary_that_the_model_has_no_rows_for_is_refused_at_load(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from octo_run.engine import Engine

    with pytest.raises(OctoError, match=r"has rows for 8,000 \(vocab_size in config\.json\)"):
        Engine.load(make_checkpoint("small", vocab_size=8000), device="cpu")
    engine = Engine.load(make_checkpoint("large", vocab_size=9000), device="cpu", max_context=256)
    assert engine.tokenizer.vocab_size == 8192


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "vocab.json"])
def test_a_model_vocabulary_beyond_the_rows_is_refused(
    tmp_path: Path, make_library: Callable[[str], Library], kind: str
) -> None:
    library = byte_fallback_unigram() if kind == "Unigram" else make_library("byte-level")
    if kind == "vocab.json":
        write_json(tmp_path / "vocab.json", json.loads(library.to_str())["model"]["vocab"])
        (tmp_path / "merges.txt").write_text("")
        write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    else:
        tokenizer_json(library, tmp_path)
    for model in configs_of(10):
        write_json(tmp_path / "config.json", model)
        assert "different models" in one_sentence(tmp_path)
    for model in configs_of(1000):
        write_json(tmp_path / "config.json", model)
        assert load_tokenizer(tmp_path).vocab_size <= 1000


@pytest.mark.few(1)
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("where", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_an_added_token_without_a_row_is_text(
    tmp_path: Path, make_library: Callable[[str], Library], demo_dir: Path, where: str, special: bool
) -> None:
    """A "[PAD]" after the last row, which many fine-tuned models have."""
    library = make_library("byte-level")
    if where == "tokenizer.model":
        (tmp_path / where).write_bytes((demo_dir / where).read_bytes())
        rows = 8192
    else:
        rows = library.get_vocab_size()
        changes = json.loads(library.to_str())
        if where == "tokenizer.json":
            changes["added_tokens"].append({"id": rows, "content": "[PAD]", "special": special, "normalized": False,
                                            "lstrip": False, "rstrip": False, "single_word": False})  # fmt: skip
        tokenizer_json(library, tmp_path, added_tokens=changes["added_tokens"])
    config: dict[str, object] = {"pad_token": "[PAD]"}
    if where != "tokenizer.json":
        config["added_tokens_decoder"] = {str(rows): {"content": "[PAD]", "special": special}}
    write_json(tmp_path / "tokenizer_config.json", config)
    assert rows in load_tokenizer(tmp_path).encode("a[PAD]", allow_special=True), "with a row it is a token"
    for model in configs_of(rows):
        write_json(tmp_path / "config.json", model)
        tok = load_tokenizer(tmp_path)
        assert tok.vocab_size == rows
        for allow in (False, True):
            ids = tok.encode("a[PAD]b", allow_special=allow)
            assert max(ids) < rows and tok.decode(ids) == "a[PAD]b"


@pytest.mark.parametrize(
    "config", [{"eos_token": "[X]"}, {"bos_token": {"content": "[X]"}}, {"chat_template": "{{ messages }}[X]"}]
)
@pytest.mark.parametrize("where", ["tokenizer.json", "tokenizer.model"])
def test_a_needed_token_without_a_row_is_refused(
    tmp_path: Path, demo_dir: Path, make_library: Callable[[str], Library], where: str, config: dict[str, object]
) -> None:
    rows = 8192
    if where == "tokenizer.model":
        (tmp_path / where).write_bytes((demo_dir / where).read_bytes())
    else:
        library = make_library("byte-level")
        rows = library.get_vocab_size()
        tokenizer_json(library, tmp_path)
    added = {"added_tokens_decoder": {str(rows): {"content": "[X]", "special": True}}}
    write_json(tmp_path / "tokenizer_config.json", config | added)
    load_tokenizer(tmp_path)
    write_json(tmp_path / "config.json", {"vocab_size": rows})
    assert f"needs the token '[X]' with id {rows}" in one_sentence(tmp_path)


def test_a_sentencepiece_vocabulary_beyond_the_rows_is_refused(tmp_path: Path, demo_dir: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((demo_dir / "tokenizer.model").read_bytes())
    write_json(tmp_path / "config.json", {"vocab_size": 8191})
    assert "has 8,192 tokens and the model has rows for 8,191" in one_sentence(tmp_path)
    assert sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).get_piece_size() == 8192
