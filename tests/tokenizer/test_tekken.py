"""tekken.json, Mistral's file of a tokenizer: a small one, merged by a search that shares nothing with ours."""

import base64
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from octo_run.errors import OctoError
from octo_run.models.files import has_tokenizer, missing_files
from octo_run.tokenizer import Tokenizer, load_tokenizer

# Mistral's own pattern needs Unicode classes that Python's `re` lacks; this one cuts at the same places in ASCII.
PATTERN = r"[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[THINK]"]
TEXT = [
    "the dog the cat then there banana ananas hahaha == -- aaaa bbbb  x\n\n y\té né 你好 the\n",
    "1984 2024 <s>",
] * 20


def trained() -> list[bytes]:
    """Bytes of tokens by rank: the 256 bytes, and what a small BPE learns."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    )
    decoder = decoders.ByteLevel()
    learnt = sorted(library.get_vocab().items(), key=lambda item: item[1])
    words = [decoder.decode([text]).encode() for text, _ in learnt if len(text) > 1]
    return [bytes([byte]) for byte in range(256)] + [
        word for word in dict.fromkeys(words) if b"\xef\xbf\xbd" not in word
    ]


TOKENS = trained()
FIRST = 12


def tekken(**changes: Any) -> dict[str, Any]:
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate([*TOKENS, b"beyond the model"])
    ]
    config = {"pattern": PATTERN, "num_vocab_tokens": len(vocabulary), "default_vocab_size": FIRST + len(TOKENS),
              "default_num_special_tokens": FIRST, "version": "v13"}  # fmt: skip
    special = [{"rank": i, "token_str": text, "is_control": i < 5} for i, text in enumerate(SPECIAL)]
    file = {"config": config, "vocab": vocabulary, "special_tokens": special, "version": 1, "type": "Tekken"}
    for name, value in changes.items():
        where = config if name in config else file
        where[name] = value
    return {name: value for name, value in file.items() if value is not ...}


def folder(path: Path, file: dict[str, Any], **others: Any) -> Path:
    (path / "tekken.json").write_text(json.dumps(file), encoding="utf-8")
    for name, value in others.items():
        (path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.fixture
def tok(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(folder(tmp_path, tekken()))


def merged(text: str) -> list[int]:
    """Of all neighbours in a piece the two merge whose bytes have the lowest rank, the leftmost of those first."""
    ranks = {token: rank for rank, token in enumerate(TOKENS)}
    ids = []
    for piece in re.findall(PATTERN, text):
        data = piece.encode()
        parts = [data] if data in ranks else [bytes([byte]) for byte in data]
        while len(parts) > 1:
            made = [ranks.get(parts[i] + parts[i + 1], 1 << 30) for i in range(len(parts) - 1)]
            if min(made) == 1 << 30:
                break
            place = made.index(min(made))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [FIRST + ranks[part] for part in parts]
    return ids


@pytest.mark.parametrize(
    "text",
    ["", "the dog", "bananananas hahahaha aaaaaaaaa", "=====----- == x", "then\n\n  there \r\n\t1984", "a/b//\n\nc  ",
     "<s>[INST] </s><SPECIAL_7>", "né 你好 🦙 \0\x7f", "beyond the model",
     *(char * n for char in "a =-\n" for n in (2, 3, 5, 17))],
)  # fmt: skip
def test_ids_are_those_of_the_ranks(tok: Tokenizer, text: str) -> None:
    plain = "".join(re.findall(PATTERN, text))
    assert plain == text, "the pattern takes every character"
    ids = tok.encode(text)
    assert ids == merged(text)
    assert tok.decode(ids) == text
    stream = tok.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == text


def test_many_texts(tok: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(1000):
        parts = rng.choice(["ab =-", "the dog 1\n\t", "na ha an", "\r\n /x", "é你🦙 a", "[INST]<s> "])
        text = "".join(rng.choice(parts) for _ in range(rng.randint(1, 40)))
        assert tok.encode(text) == merged(text), ascii(text)
        assert tok.decode(tok.encode(text)) == text


def test_special_tokens_come_first_and_never_from_text(tok: Tokenizer) -> None:
    assert (tok.vocab_size, tok.bos_id, tok.eos_ids, tok.unk_id) == (FIRST + len(TOKENS), 1, (2,), None)
    assert tok.adds_bos and tok.prompt("the")[0] == 1
    assert tok.special_ids == set(range(FIRST))
    text = "".join(SPECIAL) + "<SPECIAL_11>"
    assert tok.encode(text, allow_special=True) == [0, 1, 2, 3, 4, 5, 11]
    ids = tok.encode(text)
    assert tok.special_ids.isdisjoint(ids) and tok.decode(ids) == text
    assert tok.decode([1, 3, *tok.encode("the"), 11]) == "the"
    assert tok.decode([1, 3, 11], skip_special=False) == "<s>[INST]<SPECIAL_11>"


def test_old_files_list_no_special_tokens(tmp_path: Path) -> None:
    tok = load_tokenizer(
        folder(tmp_path, tekken(special_tokens=..., version="v3", default_vocab_size=len(TOKENS) + 12))
    )
    assert tok.encode("<s>[INST][TOOL_CALLS]<pad>", allow_special=True)[:3] == [1, 3, 9]
    assert tok.decode([9, 11], skip_special=False) == "[TOOL_CALLS]<pad>"
    more = folder(tmp_path, tekken(special_tokens=..., version="v7", default_num_special_tokens=30,
                                   default_vocab_size=len(TOKENS) + 30))  # fmt: skip
    assert load_tokenizer(more).encode("[TOOL_CONTENT]<SPECIAL_20>", allow_special=True) == [19, 20]


def test_the_config_beside_it_speaks_too(tmp_path: Path) -> None:
    """A template in chat_template.jinja, names in tokenizer_config.json, the model's rows in config.json."""
    size = FIRST + len(TOKENS)
    config = {"eos_token": "[/INST]", "add_bos_token": False}
    place = folder(tmp_path, tekken(), tokenizer_config=config, config={"vocab_size": size, "model_type": "mistral3"})
    (place / "chat_template.jinja").write_text("{{ bos_token }}[INST]{{ messages[0].content }}[/INST]")
    tok = load_tokenizer(place)
    assert tok.eos_ids == (4,) and not tok.adds_bos
    assert tok.chat([{"role": "user", "content": "the[INST]"}]) == [1, 3, *merged("the[INST]"), 4]
    (place / "config.json").write_text(json.dumps({"vocab_size": size - 1}))
    with pytest.raises(OctoError, match="different models"):
        load_tokenizer(place)


def test_which_file_is_read(tmp_path: Path, make_library: Callable[[str], Library]) -> None:
    """tokenizer.json wins; tekken.json wins over vocab.json; `pull` takes it as a tokenizer."""
    place = folder(tmp_path, tekken(), vocab={"a": 0})
    (place / "merges.txt").write_text("")
    assert load_tokenizer(place).vocab_size == FIRST + len(TOKENS)
    make_library("byte-level").save(str(place / "tokenizer.json"))
    assert load_tokenizer(place).vocab_size != FIRST + len(TOKENS)
    assert has_tokenizer(["config.json", "tekken.json"])
    assert not any("tekken" in name for name in missing_files(place))


def changed(place: int, **changes: Any) -> dict[str, Any]:
    file = tekken()
    file["vocab"][place] = {**file["vocab"][place], **changes}
    return file


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({}, '"config" in .* is no object with a pattern'),
        (tekken(pattern=3), '"config" in .* is no object with a pattern'),
        (tekken(pattern="("), r"tekken\.json is not valid tokenizer data"),
        (tekken(default_num_special_tokens=-1), '"default_num_special_tokens" in .* is no number of tokens'),
        (tekken(default_vocab_size="many"), '"default_vocab_size" in'),
        (tekken(default_vocab_size=1 << 40), '"default_vocab_size" in'),
        (tekken(default_vocab_size=4000), "no list of the 3,988 tokens"),
        (tekken(default_vocab_size=100), "no list of the 88 tokens"),
        (tekken(vocab={}), "no list of the"),
        (changed(300, rank=7), "Token 300 in .* is no token of such a file"),
        (changed(300, token_bytes=None), "Token 300 in"),
        (changed(300, token_bytes="a"), "Token 300 in"),
        (changed(300, token_bytes="\u00e9\u00e9\u00e9\u00e9"), "Token 300 in"),
        (changed(300, token_bytes=""), "Token 300 in"),
        (changed(300, token_bytes="YWFh" * 400), "Token 300 in"),
        (changed(65, token_bytes="Wg=="), "Token 65 in"),
        (changed(301, token_bytes=base64.b64encode(TOKENS[300]).decode()), "the same token twice"),
        (tekken(special_tokens=...), "version 'v13' and lists no special tokens"),
        (tekken(special_tokens=..., version=["\x1b"]), "and lists no special tokens"),
        (tekken(special_tokens=5), '"special_tokens" in .* is no list'),
        (tekken(special_tokens=[{"rank": 1, "token_str": "<s>"}]), "not in the order of their ranks"),
        (tekken(special_tokens=[{"rank": 0, "token_str": ""}]), "not all different texts"),
        (tekken(special_tokens=[{"rank": i, "token_str": "<s>"} for i in range(2)]), "not all different texts"),
        (tekken(special_tokens=[{"rank": i, "token_str": f"<{i}>"} for i in range(13)]), "lists 13 special tokens"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, file: dict[str, Any], message: str) -> None:
    with pytest.raises(OctoError, match=message) as caught:
        load_tokenizer(folder(tmp_path, file))
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
