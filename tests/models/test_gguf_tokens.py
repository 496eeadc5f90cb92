"""Tokenizers that went through a GGUF file: the ids of the real ones, on code, languages, emoji and white space."""

import json
import unicodedata
from collections.abc import Callable, Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest

from octo_run.errors import OctoError
from octo_run.models.gguf.header import read_model
from octo_run.models.gguf.tokens import PRE_TOKENIZERS, tokenizer_files
from octo_run.tokenizer import Tokenizer, load_tokenizer

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SHORT}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SHORT}|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: How the published tokenizers split: patterns one after another, and whether whole pieces are looked up first.
SPLITS: dict[str, tuple[list[str], bool]] = {
    "gpt-2": ([GPT2], False),
    "smollm": ([r"\p{N}", GPT2], False),
    "starcoder": ([r"\p{N}", GPT2], False),
    "refact": ([r"\p{N}", GPT2], False),
    "llama-bpe": ([WORDS + r"\p{N}{1,3}" + REST], True),
    "falcon3": ([WORDS + r"\p{N}{1,3}" + REST], True),
    "smaug-bpe": ([WORDS + r"\p{N}{1,3}" + REST], False),
    "qwen2": ([WORDS + r"\p{N}" + REST], False),
    "deepseek-r1-qwen": ([WORDS + r"\p{N}" + REST], False),
    "tekken": ([TEKKEN], True),
    "dbrx": ([WORDS + r"\p{N}{1,3}" + REST], False),
    "glm4": ([WORDS + r"\p{N}{1,3}" + REST], False),
    "chatglm-bpe": ([WORDS + r"\p{N}{1,3}" + REST], False),
    "gpt-4o": ([GPT4O], False),
    "seed-coder": ([WORDS + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"], False),
    "qwen35": (
        [
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        ],
        False,
    ),
    "exaone4": ([GPT2], False),
    "command-r": ([r"\p{N}", GPT2], False),
}
TEXTS = [
    "Hello, world! It's 2024, and we'RE here; they'd've gone.",
    "def main(argv):\n\tfor i in range(10):\n\t\tprint(f'{i:>4}')  # comment\r\n\r\n    return None\n",
    "Äpfel, crème brûlée, naïve façade, İstanbul, ǅ, ʰello, 中文字符测试，日本語のテキスト、한국어 텍스트",
    "Привет, мир! Καλημέρα κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea e\u0301 \u2764\ufe0f ½ ² Ⅷ ٣٤ 1234567",
    "  two  spaces   three\t\ttabs \n \n\n trailing   ",
    " ",
    "\n\n\n",
    "camelCaseAndSNAKE_CASE HTMLParser iPhone15Pro x/y//z /n path/to/\n/",
    "$100.50 + 3e-8 = <b>&amp;</b> {[()]} @user #tag \\frac{1}{2} ~~~ ||| ...",
]


def texts_of(shared_dir: Path) -> Iterator[str]:
    yield from TEXTS
    folder = shared_dir / "data"
    yield from (folder / "tokenizers/llama2/ggml-vocab-llama-spm.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    yield (folder / "text/books-heldout.txt").read_text()[:20_000]
    yield (folder / "text/wikitext2-test.txt").read_text()[:20_000]


@pytest.fixture
def imported(small_gguf: Callable[..., Any], tmp_path: Path) -> Callable[..., Tokenizer]:
    """The tokenizer of a GGUF file with these metadata (None: left out)."""

    def make(**metadata: Any) -> Tokenizer:
        small = small_gguf("llama")
        for key in [key for key in small.metadata if key.startswith("tokenizer.")]:
            del small.metadata[key]
        small.metadata |= {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
        files = tokenizer_files(read_model(small.write(tmp_path / "model.gguf"))).files
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return load_tokenizer(folder)

    return make


def byte_names() -> dict[int, str]:
    """GPT-2's letters for bytes: those that can be printed stand for themselves, the others come after 255."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = count(256)
    return {byte: chr(byte if byte in plain else next(others)) for byte in range(256)}


class PlainBpe:
    """Byte-level BPE in a few lines, with the `regex` package."""

    def __init__(self, vocabulary: dict[str, int], merges: list[str], patterns: list[str], whole: bool) -> None:
        import regex

        self.vocabulary, self.patterns, self.whole = vocabulary, [regex.compile(p) for p in patterns], whole
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.letters = byte_names()

    def split(self, text: str) -> list[str]:
        pieces = [text]
        for pattern in self.patterns:
            pieces = [part for piece in pieces for part in self._split(pattern, piece)]
        return pieces

    @staticmethod
    def _split(pattern: Any, text: str) -> Iterator[str]:
        end = 0
        for match in pattern.finditer(text):
            if match.start() > end:
                yield text[end : match.start()]
            yield match.group()
            end = match.end()
        if end < len(text):
            yield text[end:]

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in self.split(text):
            parts = [self.letters[byte] for byte in piece.encode()]
            if self.whole and "".join(parts) in self.vocabulary:
                ids.append(self.vocabulary["".join(parts)])
                continue
            while True:
                pairs = [(self.ranks.get(pair, 1 << 60), i) for i, pair in enumerate(pairwise(parts))]
                rank, place = min(pairs, default=(1 << 60, 0))
                if rank == 1 << 60:
                    break
                parts[place : place + 2] = ["".join(parts[place : place + 2])]
            ids += [self.vocabulary[part] for part in parts]
        return ids


@pytest.fixture(scope="session")
def llama3(shared_dir: Path) -> tuple[dict[str, int], list[str]]:
    folder = shared_dir / "data" / "tokenizers" / "llama3.2_ollama"
    vocabulary = json.loads((folder / "encoder.json").read_text())
    merges = [
        line for line in (folder / "vocab.bpe").read_text().split("\n") if line and not line.startswith("#version")
    ]
    return vocabulary, merges


def test_every_pre_tokenizer_is_tried() -> None:
    assert {*PRE_TOKENIZERS} == {*SPLITS, "llama3", "llama-v3"}  # which are llama-bpe
    text = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    assert all(f"`{pre}`" in text for pre in SPLITS)


@pytest.mark.slow
@pytest.mark.parametrize("pre", SPLITS)
def test_every_split_is_that_of_its_patterns(
    pre: str, llama3: tuple[dict[str, int], list[str]], shared_dir: Path, imported: Callable[..., Tokenizer]
) -> None:
    """Llama 3's real vocabulary, whose merges reach far enough to show where a text is cut."""
    vocabulary, merges = llama3
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), "<|begin_of_text|>", "<|eot_id|>", "[PAD128002]"]
    tok = imported(
        model="gpt2", pre=pre, tokens=tokens, merges=merges, token_type=[1] * len(vocabulary) + [3, 3, 5],
        bos_token_id=len(vocabulary), eos_token_id=len(vocabulary) + 1,
    )  # fmt: skip
    oracle = PlainBpe(vocabulary, merges, *SPLITS[pre])
    for text in texts_of(shared_dir):
        plain = unicodedata.normalize("NFC", text) if "qwen" in pre or pre == "command-r" else text
        ids = tok.encode(text)
        assert ids == oracle.encode(plain), text[:80]
        assert tok.decode(ids) == plain
    assert tok.adds_bos == (pre in ("llama-bpe", "falcon3", "tekken"))
    assert len(vocabulary) + 1 in tok.encode("<|eot_id|>", allow_special=True)
    assert not {len(vocabulary), len(vocabulary) + 1, len(vocabulary) + 2} & {*tok.encode("<|eot_id|>[PAD128002]")}


@pytest.mark.slow
def test_other_tools_read_the_same_tokenizer(
    llama3: tuple[dict[str, int], list[str]], imported: Callable[..., Tokenizer], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    vocabulary, merges = llama3
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), "<|begin_of_text|>", "<|eot_id|>", "<think>"]
    begin = len(vocabulary)
    tok = imported(
        model="gpt2", pre="llama-bpe", tokens=tokens, merges=merges, token_type=[1] * begin + [3, 3, 4],
        bos_token_id=begin, eos_token_id=begin + 1,
    )  # fmt: skip
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "folder"))
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tok.prompt(text) == [begin, *tok.encode(text)]
    assert theirs("a<think>b<|eot_id|>", add_special_tokens=False)["input_ids"] == tok.encode(
        "a<think>b<|eot_id|>", allow_special=True
    )
    assert begin + 2 in tok.encode("a<think>b"), "a token that the user defined is no special one"


@pytest.mark.slow
def test_qwen2_comes_back(shared_dir: Path, imported: Callable[..., Tokenizer]) -> None:
    folder = shared_dir / "data" / "tokenizers" / "qwen2"
    vocabulary = json.loads((folder / "vocab.json").read_text())
    added = json.loads((folder / "added_tokens.json").read_text())
    tokens = sorted(vocabulary | added, key=(vocabulary | added).__getitem__)
    merges = [
        line for line in (folder / "merges.txt").read_text().split("\n") if line and not line.startswith("#version")
    ]
    tok = imported(
        model="gpt2", pre="qwen2", tokens=tokens, merges=merges, token_type=[3 if t in added else 1 for t in tokens],
        eos_token_id=added["<|im_end|>"], padding_token_id=added["<|endoftext|>"], add_bos_token=False,
    )  # fmt: skip
    original = load_tokenizer(folder)
    for text in texts_of(shared_dir):
        assert tok.encode(text) == original.encode(text), text[:80]
    text = "<|im_start|>user\nHi<|im_end|>\n"
    assert tok.encode(text, allow_special=True) == original.encode(text, allow_special=True)
    assert tok.special_ids >= original.special_ids and not tok.adds_bos


@pytest.fixture
def llama2(shared_dir: Path) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for Llama 2's tokenizer."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(shared_dir / "data/tokenizers/llama2/tokenizer.model"))
    kinds = [(model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6)]
    ids = range(model.get_piece_size())
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "token_type": [next((kind for is_kind, kind in kinds if is_kind(i)), 1) for i in ids],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def test_llama2_comes_back(
    shared_dir: Path, llama2: dict[str, Any], imported: Callable[..., Tokenizer], tmp_path: Path
) -> None:
    tok = imported(**llama2)
    folder = shared_dir / "data/tokenizers/llama2"
    original = tmp_path / "original"
    original.mkdir()
    (original / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (original / "tokenizer_config.json").write_text('{"legacy": true, "add_bos_token": true}')
    theirs = load_tokenizer(original)
    for text in texts_of(shared_dir):
        assert tok.encode(text) == theirs.encode(text), text[:80]
        assert tok.decode(tok.encode(text)) == theirs.decode(theirs.encode(text))
    inputs = (folder / "ggml-vocab-llama-spm.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    outputs = (folder / "ggml-vocab-llama-spm.gguf.out").read_text().split("\n")
    assert len(inputs) > 40
    for text, ids in zip(inputs, outputs, strict=False):
        assert tok.encode(text) == [int(i) for i in ids.split()], text
    assert (tok.bos_id, tok.eos_ids, tok.unk_id, tok.adds_bos) == (1, (2,), 0, True)
    assert tok.special_ids == theirs.special_ids
    # after a special token, as llama.cpp does, the text begins with a space again
    assert tok.encode("<s>Hello", allow_special=True) == [1, *tok.encode("Hello")]


@pytest.mark.slow
def test_llama2_with_tokens_of_its_own(llama2: dict[str, Any], imported: Callable[..., Tokenizer]) -> None:
    plain = imported(**llama2)
    llama2["tokens"] += ["<|im_start|>", "<|im_end|>", "<my tool>", "[PAD32003]", ""]
    llama2["scores"] += [-1000.0] * 5
    llama2["token_type"] += [3, 4, 4, 5, 1]
    tok = imported(**llama2, add_space_prefix=False, add_bos_token=False)
    assert tok.encode("a<my tool>b") == [*tok.encode("a"), 32002, *tok.encode("b")]
    assert tok.decode([32002]) == "<my tool>"
    assert tok.encode("<|im_start|>x<|im_end|>", allow_special=True)[::2] == [32000, 32001]
    assert not {32000, 32001, 32003, 32004} & {*tok.encode("<|im_start|>x<|im_end|>[PAD32003]")}
    assert tok.encode("Hello") != plain.encode("Hello") and tok.decode(tok.encode("Hello")) == "Hello"
    assert not tok.adds_bos


def test_sentencepiece_that_is_not_supported(llama2: dict[str, Any], imported: Callable[..., Tokenizer]) -> None:
    with pytest.raises(OctoError, match="precompiled_charsmap is given"):
        imported(**llama2, precompiled_charsmap=[1, 2, 3])
    with pytest.raises(OctoError, match=r"scores is missing"):
        imported(**{**llama2, "scores": None})
    with pytest.raises(OctoError, match=r"token_type holds 9, which is no type"):
        imported(**{**llama2, "token_type": [*llama2["token_type"][:-1], 9]})


def test_ends_and_templates(small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    small = small_gguf("llama")
    tokens = small.metadata["tokenizer.ggml.tokens"]
    tokens[5], tokens[6] = "<|eot_id|>", "<|odd_end|>"  # the first no control token: llama.cpp makes it one
    small.metadata |= {"tokenizer.ggml.eot_token_id": 6}
    result = tokenizer_files(read_model(small.write(tmp_path / "model.gguf")))
    assert result.ends == {"eos_token_id": [2, 6, 5, 0], "bos_token_id": 1}
    assert result.files["chat_template.jinja"].decode() == small.metadata["tokenizer.chat_template"]
    added = json.loads(result.files["tokenizer.json"])["added_tokens"]
    assert [entry["id"] for entry in added if entry["special"]] == [0, 1, 2, 5]


def test_the_ends_of_gpt_oss(small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    """``<|end|>`` ends a thought there, and an answer elsewhere."""
    small = small_gguf("llama")
    tokens = small.metadata["tokenizer.ggml.tokens"]
    tokens[5], tokens[6], tokens[7], tokens[2] = "<|end|>", "<|return|>", "<|call|>", "unused"
    small.metadata |= {"tokenizer.ggml.eos_token_id": 6, "tokenizer.ggml.eot_token_id": 5}
    ends = tokenizer_files(read_model(small.write(tmp_path / "model.gguf"))).ends
    assert ends["eos_token_id"] == [6, 7, 0]
    tokens[7] = "<|other|>"
    assert 5 in tokenizer_files(read_model(small.write(tmp_path / "other.gguf"))).ends["eos_token_id"]


def test_special_tokens_of_phi3_swallow_white_space(
    llama2: dict[str, Any], small_gguf: Callable[..., Any], tmp_path: Path
) -> None:
    """As its published tokenizer says of each and the metadata do not."""
    llama2["tokens"] += ["<|endoftext|>", "<|user|>", "<|end|>"]
    llama2["scores"] += [-1000.0] * 3
    llama2["token_type"] += [3, 3, 3]
    small = small_gguf("llama")
    small.metadata |= {f"tokenizer.ggml.{key}": value for key, value in llama2.items()}
    small.metadata |= {"tokenizer.ggml.merges": None}
    found = {}
    for arch in ("phi3", "llama"):
        small.arch = arch
        folder = tmp_path / arch
        folder.mkdir()
        for name, content in tokenizer_files(read_model(small.write(tmp_path / f"{arch}.gguf"))).files.items():
            (folder / name).write_bytes(content)
        tok = load_tokenizer(folder)
        found[arch] = [
            tok.encode(text, allow_special=True) for text in ("<|user|>\n Hi<|end|>\n<s>\nHi", "<|endoftext|>\n")
        ]
        hi, line = tok.encode("Hi"), tok.encode("\n")
    assert found["phi3"] == [[32001, *hi, 32002, 1, *tok.encode("\nHi")], [32000, *line]]
    assert found["llama"][0] == [32001, *tok.encode("\n Hi"), 32002, *line, 1, *tok.encode("\nHi")]
