"""Ids and texts of 2,000 nasty strings for each real tokenizer, against the libraries that others read it with."""

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import sentencepiece
from tokenizers import AddedToken as LibraryToken
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from octo_run.tokenizer import Tokenizer, load_tokenizer

COUNT = 2000
# fmt: off
#: Blocks of Unicode: all planes that hold characters, and what tokenizers treat on their own.
BLOCKS = {
    "ASCII": (0x00, 0x7F), "Latin": (0xA0, 0x24F), "combining": (0x300, 0x36F), "Greek": (0x370, 0x3FF),
    "Cyrillic": (0x400, 0x4FF), "Hebrew": (0x590, 0x5FF), "Arabic": (0x600, 0x6FF), "Devanagari": (0x900, 0x97F),
    "Bengali": (0x980, 0x9FF), "Tamil": (0xB80, 0xBFF), "Thai": (0xE00, 0xE7F), "Tibetan": (0xF00, 0xFFF),
    "Jamo": (0x1100, 0x11FF), "Ethiopic": (0x1200, 0x137F), "Khmer": (0x1780, 0x17FF), "Mongolian": (0x1800, 0x18AF),
    "Latin more": (0x1E00, 0x1EFF), "punctuation": (0x2000, 0x206F), "numbers": (0x2070, 0x209F),
    "letterlike": (0x2100, 0x218F), "arrows": (0x2190, 0x22FF), "boxes": (0x2500, 0x27BF),
    "CJK marks": (0x3000, 0x30FF),
    "CJK": (0x4E00, 0x9FFF), "Hangul": (0xAC00, 0xD7AF), "private": (0xE000, 0xF8FF), "CJK same": (0xF900, 0xFAFF),
    "forms": (0xFB00, 0xFDFF), "variation": (0xFE00, 0xFE6F), "half and full width": (0xFF00, 0xFFEF),
    "specials": (0xFFF0, 0xFFFF), "plane 1": (0x10000, 0x1FFFF), "mathematics": (0x1D400, 0x1D7FF),
    "emoji": (0x1F300, 0x1FAFF), "plane 2": (0x20000, 0x2FFFF), "plane 3": (0x30000, 0x3FFFF),
    "planes without characters": (0x40000, 0xDFFFF), "plane 14": (0xE0000, 0xEFFFF),
    "private planes": (0xF0000, 0x10FFFF),
}
SPACES = [
    " ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\n\n", " \n", "\n ", "\t ", "\x0b", "\x0c", "\x1c", "\x1f", "\x85",
    "\xa0", "\u1680", "\u2002", "\u2009", "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\u180e",
    "\u2581",
]
INVISIBLE = [
    "\u200b", "\u200c", "\u200d", "\u200e", "\u200f", "\u202a", "\u202b", "\u202c", "\u202d", "\u202e", "\u2060",
    "\u2066", "\u2069", "\ufeff", "\u00ad", "\u034f", "\u061c", "\ufffc", "\ufffd", "\ufe0f", "\ufe0e", "\0", "\x7f",
]
EMOJI = [
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f1e9\U0001f1ea",
    "\U0001f44d\U0001f3fd", "1\ufe0f\u20e3", "\u2764\ufe0f\u200d\U0001f525", "\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "\u263a", "\U0001f999",
]
#: What normal forms change: compatibility characters, precomposed and not, marks in another order, singletons.
UNNORMAL = [
    "e\u0301", "\u00e9", "a\u0323\u0307", "a\u0307\u0323", "\u1e9b\u0323", "\ufb01", "\u212b", "\u2126",
    "\u1100\u1161\u11a8",
    "\uac01", "\u0958", "\u0915\u093c", "\ufa10", "\U0002f800", "\uff21\uff11", "\u2460", "\u00bd", "\u0130", "\u0131",
    "\u1e9e", "\u03c2", "\u0345", "\u0f73", "\u0344", "\u2f00", "\u3392", "\u01c4", "\u0e33", "\u0b94", "\u0bca",
]
CODE = [
    "def f(x: int) -> int:\n\treturn x**2  # \u00e9\n", "for (int i = 0; i < n; ++i) { a[i] = *p++; }\r\n",
    "<div class=\"x\">&nbsp;</div>",
    "\\frac{1}{2}", "$HOME/.config/*.json", "SELECT * FROM t WHERE a='b''c';", "{{ x }}{% if y %}", "0x7fFF", "1e-5",
    "a_b__c",
    "camelCaseHTTPServer", "if __name__ == \"__main__\":", "#!/bin/sh\n", "{\"a\": [1, 2.50, null]}", "x\\n\\t\\\\",
]
WORDS = [
    "the", "Hello", "don't", "I'LL", "we've", "it's", "O'Neil", "'s", "'S", "\u2019s", "naive", "stra\u00dfe",
    "na\u00efve",
    "\u4f60\u597d\u4e16\u754c", "\u3053\u3093\u306b\u3061\u306f", "\uc548\ub155\ud558\uc138\uc694",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e04\u0e23\u0e31\u0e1a", "\u0645\u0631\u062d\u0628\u0627",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u041f\u0440\u0438\u0432\u0435\u0442", "\u0c28\u0c2e\u0c38\u0c4d\u0c15\u0c3e\u0c30\u0c02", "\u1206\u1208",
    "\u1019\u103c\u1014\u103a",
]
DIGITS = [
    "0", "7", "42", "1234", "12345678901234567890", "3.14", "1,000,000", "\u0663\u0664", "\u096a\u096b", "\u00b2",
    "\u2167", "\uff14\uff12",
    "\U0001d7d9",
]
#: Special tokens of many models, and what is nearly one.
SPECIAL = [
    "<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>",
    "<|start_header_id|>", "[INST]", "[/INST]", "<<SYS>>", "<0x0A>", "<0xE2>", "<|im_", "start|>", "<|", "|>",
    "< s>", "<s",
    "<S>", "<|IM_END|>", "<start_of_turn>", "\uff5c", "<\uff5cUser\uff5c>", "<think>", "</think>", "<tool_call>",
    "<|reserved|>",
]
# fmt: on


def strings(seed: str, count: int = COUNT) -> list[str]:
    """Nasty strings, the same ones for the same seed; no surrogates, which are no text."""
    rng = random.Random(seed)
    lists = [SPACES, INVISIBLE, EMOJI, UNNORMAL, CODE, WORDS, DIGITS, SPECIAL]

    def block(name: str) -> str:
        return chr(rng.randint(*BLOCKS[name]))

    def mixture() -> str:
        chosen = rng.sample(lists, rng.randint(1, 4))
        return "".join(rng.choice(rng.choice(chosen)) for _ in range(rng.randint(1, 16)))

    def of_one_block() -> str:
        name = rng.choice(list(BLOCKS))
        return "".join(block(name) for _ in range(rng.randint(1, 12)))

    def of_many_blocks() -> str:
        return "".join(block(rng.choice(list(BLOCKS))) for _ in range(rng.randint(1, 20)))

    def sentence() -> str:
        return rng.choice(SPACES).join(rng.choice(rng.choice([WORDS, DIGITS, CODE])) for _ in range(rng.randint(1, 10)))

    def long() -> str:
        return rng.choice(rng.choice(lists)) * rng.choice([2, 3, 7, 16, 64, 200])

    def stacked() -> str:
        return "".join(rng.choice("aeo\u0915\u0e01 ") + "".join(block("combining") for _ in range(rng.randint(1, 6)))
                       for _ in range(rng.randint(1, 4)))  # fmt: skip

    def edges() -> str:
        return rng.choice(SPACES) * rng.randint(0, 3) + mixture() + rng.choice(SPACES) * rng.randint(0, 3)

    fixed = ["", *SPACES, *INVISIBLE, *EMOJI, *UNNORMAL, *CODE, *WORDS, *DIGITS, *SPECIAL]
    fixed += [a + b for a in SPACES[:9] for b in SPACES[:9]]
    fixed += [chr(code) for code in range(256)]
    kinds = [mixture, mixture, of_one_block, of_many_blocks, sentence, long, stacked, edges]
    texts = [*fixed, *(rng.choice(kinds)() for _ in range(COUNT - len(fixed)))]
    rng.shuffle(texts)
    return texts[:count]


class Reference(Protocol):
    """How another library reads the same files.

    Attributes:
        special: Whether it finds special tokens in texts, as `encode(text, allow_special=True)` does.
    """

    special: bool

    def encode(self, texts: list[str], special: bool) -> list[list[int]]: ...

    def decode(self, ids: list[int], skip_special: bool) -> str: ...


class SentencePiece:
    special = False

    def __init__(self, path: Path) -> None:
        self._sp = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def encode(self, texts: list[str], special: bool) -> list[list[int]]:
        return [list(self._sp.encode(text)) for text in texts]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return str(self._sp.decode(ids))


class Transformers:
    special = True

    def __init__(self, folder: Path) -> None:
        self._tok = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(str(folder))

    def encode(self, texts: list[str], special: bool) -> list[list[int]]:
        encoded = self._tok(texts, add_special_tokens=False, split_special_tokens=not special)
        return [list(ids) for ids in encoded.input_ids]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return str(self._tok.decode(ids, skip_special_tokens=skip_special))


class Plain:
    """The tokenizers library on a small tokenizer.json."""

    special = True

    def __init__(self, library: Library) -> None:
        self._library = library

    def encode(self, texts: list[str], special: bool) -> list[list[int]]:
        self._library.encode_special_tokens = not special
        return [encoded.ids for encoded in self._library.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return str(self._library.decode(ids, skip_special_tokens=skip_special))


def compare(tok: Tokenizer, reference: Reference, texts: list[str]) -> None:
    """The same ids, with special tokens found in the text and without; the same text of them, whole and in pieces."""
    for special in {False, reference.special}:
        for text, expected in zip(texts, reference.encode(texts, special), strict=True):
            ids = tok.encode(text, allow_special=special)
            assert ids == expected, ascii(text)
            assert special or tok.special_ids.isdisjoint(ids), ascii(text)
            for skip in {True, not reference.special}:
                whole = tok.decode(ids, skip_special=skip)
                assert whole == reference.decode(ids, skip), ascii(text)
                stream = tok.stream(skip_special=skip)
                assert "".join([*map(stream.push, ids), stream.finish()]) == whole, ascii(text)


def test_the_strings_are_as_nasty_as_they_should_be() -> None:
    texts = strings("x")
    joined = "".join(texts)
    assert len(texts) >= COUNT - 20 and len(set(texts)) > COUNT * 0.9 and max(map(len, texts)) > 1000
    assert {ord(char) >> 16 for char in joined} == set(range(17)), "characters of all planes"
    assert {"Mn", "Mc", "Me", "Cf", "Zl", "Zp", "Co", "Cn", "Nd", "Nl", "No", "Lt", "Lm", "Sk"} <= {
        unicodedata.category(char) for char in joined
    }
    assert sum(unicodedata.normalize("NFC", text) != text for text in texts) > 100
    assert sum("<|im_end|>" in text for text in texts) > 10


def test_llama2(llama2: Tokenizer, shared: Callable[[str], Path]) -> None:
    compare(llama2, SentencePiece(shared("tokenizers/llama2") / "tokenizer.model"), strings("llama2"))


@pytest.mark.slow
def test_qwen2(qwen2: Tokenizer, qwen2_dir: Path) -> None:
    compare(qwen2, Transformers(qwen2_dir), strings("qwen2"))


@pytest.mark.slow
def test_llama3(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """The folder has vocabulary and merges under names of its own; the rest of tokenizer.json is Llama 3's."""
    folder = shared("tokenizers/llama3.2_ollama")
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    library = Library(models.BPE(vocabulary, merges, ignore_merges=True))
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(words + rest), "isolated")
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer, library.decoder = pre_tokenizers.Sequence([split, levels]), decoders.ByteLevel()
    library.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    compare(load_tokenizer(tmp_path), Transformers(tmp_path), strings("llama3"))


def test_the_demo_model(demo: Tokenizer, demo_dir: Path) -> None:
    """Without texts of special tokens, which SentencePiece finds in texts here, and octo-run does not."""
    texts = [text for text in strings("demo") if not any(mark in text for mark in ("<|im_start|>", "<|im_end|>"))]
    assert len(texts) > COUNT * 0.8
    compare(demo, SentencePiece(demo_dir / "tokenizer.model"), texts)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["byte-level", "metaspace-first", "metaspace-always", "prepend"])
def test_small_tokenizers_of_each_kind(kind: str, make_library: Callable[[str], Library], tmp_path: Path) -> None:
    library = make_library(kind)
    library.save(str(tmp_path / "tokenizer.json"))
    compare(load_tokenizer(tmp_path), Plain(library), strings(kind, 500))


@pytest.mark.few(1)
@pytest.mark.parametrize("form", ["NFC", "NFKC", "NFD"])
def test_normal_forms(form: str, make_library: Callable[[str], Library], tmp_path: Path) -> None:
    library = make_library("byte-level")
    library.normalizer = getattr(normalizers, form)()
    library.add_tokens([LibraryToken("end!", normalized=True), LibraryToken("\ufb01n", normalized=False)])
    library.save(str(tmp_path / "tokenizer.json"))
    compare(load_tokenizer(tmp_path), Plain(library), [*strings(form, 500), "xend!x\ufb01n", "\uff45nd! fin"])


OPTIONS: dict[str, dict[str, Any]] = {
    "identity": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "no prefix": {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "NFKC": {"normalization_rule_name": "nmt_nfkc"},
    "unigram": {"normalization_rule_name": "nmt_nfkc", "model_type": "unigram", "vocab_size": 500},
    "collapsing": {
        "normalization_rule_name": "identity",
        "user_defined_symbols": ["<think>", "[INST]", "\u2581\u2581"],
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_small_sentencepiece_models(name: str, spm_model: Callable[..., bytes], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(spm_model(**OPTIONS[name]))
    compare(load_tokenizer(tmp_path), SentencePiece(tmp_path / "tokenizer.model"), strings(name, 500))
