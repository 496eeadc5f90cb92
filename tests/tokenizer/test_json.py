"""tokenizer.json of the common kinds, and GPT-2 style vocab.json + merges.txt, against the libraries themselves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from octo_run.errors import OctoError
from octo_run.tokenizer import Tokenizer, load_tokenizer

UNICODE = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
PARTS = [
    "<s>", "</s>", "<unk>", "<|begin|>", "<|end|>", "<|user|>", "<mask>", "<think>", "<|stop|>",
    "<|", "end|>", "<", " ", "  ", "\n", "the dog", "word", "x", "é",
]  # fmt: skip
QWEN_PARTS = st.lists(st.sampled_from(["<|im_end|>", "<|im_", " ", "I'll", "42", "\n", "é"])).map("".join)
MIXED = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture(scope="session", params=["byte-level", "metaspace-first", "metaspace-always", "prepend"])
def json_tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_library: Callable[[str], Library]
) -> Path:
    """A folder with a tokenizer.json of each common kind, and no other file."""
    folder = tmp_path_factory.mktemp(request.param)
    make_library(request.param).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def byte_level_dir(tmp_path: Path, make_library: Callable[[str], Library]) -> Path:
    make_library("byte-level").save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.few(1)
@settings(max_examples=200, deadline=None)
@given(text=st.one_of(UNICODE, MIXED))
def test_encoding_with_special_tokens_equals_the_library(json_tokenizer: Path, text: str) -> None:
    library, tok = load_both(json_tokenizer)
    assert tok.encode(text, allow_special=True) == library.encode(text, add_special_tokens=False).ids


@pytest.mark.few(2)
@settings(max_examples=200, deadline=None)
@given(text=st.one_of(UNICODE, MIXED))
def test_text_gives_no_special_id(json_tokenizer: Path, text: str) -> None:
    _, tok = load_both(json_tokenizer)
    ids = tok.encode(text)
    assert tok.special_ids.isdisjoint(ids)
    assert tok.decode(ids) in (text, text.replace("▁", " "), text.replace("▁", " ").removeprefix(" "))


@pytest.mark.few(2)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_decoding_equals_the_library(json_tokenizer: Path, data: st.DataObject) -> None:
    library, tok = load_both(json_tokenizer)
    ids = data.draw(st.lists(st.integers(0, tok.vocab_size - 1), max_size=20))
    if not json_tokenizer.name.startswith("byte-level"):
        ids = [i for i in ids if i < 3 or i >= 3 + 256]  # the library replaces whole runs of bytes if one is ill-formed
    assert tok.decode(ids) == library.decode(ids, skip_special_tokens=True)


_LOADED: dict[Path, tuple[Library, Tokenizer]] = {}


def load_both(folder: Path) -> tuple[Library, Tokenizer]:
    if folder not in _LOADED:
        _LOADED[folder] = (Library.from_file(str(folder / "tokenizer.json")), load_tokenizer(folder))
    return _LOADED[folder]


def test_bos_of_the_post_processor(byte_level_dir: Path) -> None:
    tok = load_tokenizer(byte_level_dir)
    assert tok.adds_bos and tok.bos_id is not None
    assert tok.encode("x", add_bos=True)[0] == tok.bos_id
    assert tok.encode("x")[0] != tok.bos_id
    write_json(byte_level_dir / "tokenizer_config.json", {"add_bos_token": False, "bos_token": "<|begin|>"})
    assert not load_tokenizer(byte_level_dir).adds_bos


def test_an_eos_that_its_file_does_not_call_special(byte_level_dir: Path) -> None:
    """<|stop|> is an ordinary added token in tokenizer.json, but the end of an answer in tokenizer_config.json."""
    plain = load_tokenizer(byte_level_dir)
    stop = plain.encode("<|stop|>")
    assert len(stop) == 1
    write_json(byte_level_dir / "tokenizer_config.json", {"eos_token": {"content": "<|stop|>"}})
    tok = load_tokenizer(byte_level_dir)
    assert tok.eos_ids == tuple(stop) and stop[0] in tok.special_ids
    ids = tok.encode("a<|stop|>b")
    assert stop[0] not in ids and tok.decode(ids) == "a<|stop|>b"
    assert tok.encode("a<|stop|>b", allow_special=True)[1] == stop[0]


def test_tokens_of_the_config_are_added(byte_level_dir: Path) -> None:
    size = load_tokenizer(byte_level_dir).vocab_size
    entry = {"content": "<|extra|>", "special": True}
    write_json(byte_level_dir / "tokenizer_config.json", {"added_tokens_decoder": {str(size): entry}})
    tok = load_tokenizer(byte_level_dir)
    assert tok.encode("<|extra|>", allow_special=True) == [size]
    write_json(byte_level_dir / "tokenizer_config.json", {"added_tokens_decoder": {str(size + 9): entry}})
    with pytest.raises(OctoError, match="do not match"):
        load_tokenizer(byte_level_dir)


def test_a_files_truncation_is_not_applied(byte_level_dir: Path) -> None:
    library = Library.from_file(str(byte_level_dir / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=16)
    library.save(str(byte_level_dir / "tokenizer.json"))
    tok = load_tokenizer(byte_level_dir)
    for text in ("x", "The quick brown fox jumps over the lazy dog, twice."):
        assert tok.decode(tok.encode(text), skip_special=False) == text


def test_an_exclamation_mark_as_padding_stays_text(byte_level_dir: Path) -> None:
    write_json(byte_level_dir / "tokenizer_config.json", {"pad_token": "!"})
    tok = load_tokenizer(byte_level_dir)
    assert tok.decode(tok.encode("Hello!")) == "Hello!"


def test_a_model_that_spells_special_tokens(tmp_path: Path) -> None:
    """A unigram vocabulary holds "</s>" as a piece like any other, which its search finds in text."""
    vocabulary = [("<unk>", 0.0), ("</s>", -1.0), *((char, -9.0) for char in "▁</s>abc")]
    library = Library(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    library.decoder = decoders.Metaspace(prepend_scheme="never")
    library.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "</s>"})
    tok = load_tokenizer(tmp_path)
    assert 1 not in tok.encode("a</s>b") and tok.decode(tok.encode("a</s>b")) == "a</s>b"
    assert 1 in tok.encode("a</s>b", allow_special=True)


def test_tokenizer_json_wins_over_tokenizer_model(byte_level_dir: Path, demo_dir: Path) -> None:
    shutil.copy(demo_dir / "tokenizer.model", byte_level_dir)
    assert load_tokenizer(byte_level_dir).vocab_size < 1000


def test_a_decoder_that_cannot_stream_is_refused(tmp_path: Path, make_library: Callable[[str], Library]) -> None:
    library = make_library("metaspace-first")
    library.decoder = decoders.WordPiece()
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(OctoError, match="decoder WordPiece"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "Nonsense"}}'])
def test_a_damaged_tokenizer_json_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(OctoError, match=r"tokenizer\.json is not valid|JSON list") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def gpt2_folder(
    tmp_path: Path, make_library: Callable[[str], Library]
) -> Callable[[dict[str, object]], tuple[Path, Library]]:
    """Make a folder with vocab.json, merges.txt and this tokenizer_config.json."""

    def make(config: dict[str, object]) -> tuple[Path, Library]:
        return write_gpt2_files(tmp_path, make_library("byte-level"), config)

    return make


def write_gpt2_files(tmp_path: Path, library: Library, config: dict[str, object]) -> tuple[Path, Library]:
    model = json.loads(library.to_str())["model"]
    write_json(tmp_path / "vocab.json", model["vocab"])
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges + "\n", encoding="utf-8")
    write_json(tmp_path / "tokenizer_config.json", config)
    return tmp_path, library


def test_gpt2_files(gpt2_folder: Callable[[dict[str, object]], tuple[Path, Library]]) -> None:
    folder, library = gpt2_folder({"tokenizer_class": "GPT2TokenizerFast"})
    tok = load_tokenizer(folder)
    for text in ("the dog, she's 1984  years", " Äpfel\n\n你好", ""):
        assert tok.encode(text) == library.encode(text, add_special_tokens=False).ids
    folder, _ = gpt2_folder({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True})
    assert load_tokenizer(folder).encode("the") == tok.encode(" the")


def test_gpt2_files_of_an_unknown_class(gpt2_folder: Callable[[dict[str, object]], tuple[Path, Library]]) -> None:
    folder, _ = gpt2_folder({"tokenizer_class": "MysteryTokenizer"})
    with pytest.raises(OctoError, match="not for MysteryTokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "{", "not valid JSON"),
        ("vocab.json", '{"a": "b"}', "integer from 0 on"),
        ("merges.txt", "a b c", r"Line 1 of .*merges\.txt"),
        ("merges.txt", "zz yy", r"'zz' and 'yy' in .*merges\.txt makes no token"),
    ],
)
def test_damaged_gpt2_files(
    gpt2_folder: Callable[[dict[str, object]], tuple[Path, Library]], name: str, content: str, message: str
) -> None:
    folder, _ = gpt2_folder({"tokenizer_class": "GPT2Tokenizer"})
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(OctoError, match=message):
        load_tokenizer(folder)


@pytest.fixture(scope="module")
def qwen2_reference(qwen2_dir: Path) -> object:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(qwen2_dir))


@settings(max_examples=150, deadline=None)
@given(
    text=st.one_of(
        UNICODE, st.lists(st.sampled_from(["<|im_end|>", "<|im_", " ", "I'll", "42", "\n", "é"])).map("".join)
    )
)
def test_qwen2_equals_transformers(qwen2: Tokenizer, qwen2_reference: object, text: str) -> None:
    expected = qwen2_reference(text, add_special_tokens=False).input_ids  # type: ignore[operator]
    assert qwen2.encode(text, allow_special=True) == expected
    assert qwen2.special_ids.isdisjoint(qwen2.encode(text))


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 151645), max_size=20))
def test_qwen2_decodes_as_transformers(qwen2: Tokenizer, qwen2_reference: object, ids: list[int]) -> None:
    assert qwen2.decode(ids) == qwen2_reference.decode(ids, skip_special_tokens=True)  # type: ignore[attr-defined]


def test_added_token_flags_survive(byte_level_dir: Path) -> None:
    tok = load_tokenizer(byte_level_dir)
    user = tok.encode("<|user|>", allow_special=True)
    assert tok.encode("<|user|> \n x", allow_special=True) == user + tok.encode("x")


@pytest.mark.parametrize("target", ["itself", "nothing"])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tekken.json", "vocab.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_links_that_lead_nowhere_are_one_sentence(byte_level_dir: Path, name: str, target: str) -> None:
    """A loop cannot be looked at; a link to nothing is a file that is missing, unless it is the vocabulary."""
    file = byte_level_dir / name
    if name in ("tekken.json", "vocab.json"):
        (byte_level_dir / "tokenizer.json").unlink()
        (byte_level_dir / "merges.txt").write_text("")
    file.unlink(missing_ok=True)
    file.symlink_to(name if target == "itself" else "not-there")
    if target == "nothing" and name in ("tokenizer_config.json", "chat_template.jinja"):
        load_tokenizer(byte_level_dir)
        return
    with pytest.raises(OctoError) as caught:
        load_tokenizer(byte_level_dir)
    assert name in str(caught.value) and "\n" not in str(caught.value)
