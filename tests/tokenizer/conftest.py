"""Small tokenizers made on the spot, and the shared data where it lies beside the checkout."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

import octo_run.tokenizer as octo_tokenizer

REPO = Path(__file__).resolve().parents[2]
DATA = REPO.parent / "shared" / "data"
TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "She sells sea shells by the sea shore; 1984 was a year like 2024.",
    "def main():\n    return {'user': 'assistant', 'end': [1, 2, 3]}\n",
    "Äpfel und Birnen, crème brûlée, 你好世界, привет мир, <im> end start |user|",
] * 8


def byte_level_tokenizer() -> Library:
    """Like Llama 3: byte-level BPE, BOS by the post-processor."""
    tok = Library(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tok.add_special_tokens(["<|begin|>", "<|end|>"])
    tok.add_special_tokens([AddedToken("<|user|>", rstrip=True), AddedToken("<mask>", lstrip=True, single_word=True)])
    tok.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<|stop|>", normalized=False)])
    begin = tok.token_to_id("<|begin|>")
    tok.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    return tok


def metaspace_tokenizer(scheme: str) -> Library:
    """Like Llama 2: BPE over spaces written as U+2581, byte fallback, a space before the text."""
    tok = Library(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [word for line in TEXT for word in line.split()]
    tok.train_from_iterator(words, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    state = json.loads(tok.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the byte tokens are ordinary ones
    return Library.from_str(json.dumps(state))


def prepend_tokenizer() -> Library:
    """Like Llama 2's older files: a normaliser writes the space before every stretch of text."""
    tok = metaspace_tokenizer("always")
    tok.pre_tokenizer = None
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tok


@pytest.fixture(scope="session")
def make_library() -> Callable[[str], Library]:
    """The tokenizers library's tokenizer of each common kind."""
    makers: dict[str, Callable[[], Library]] = {
        "byte-level": byte_level_tokenizer,
        "metaspace-first": lambda: metaspace_tokenizer("first"),
        "metaspace-always": lambda: metaspace_tokenizer("always"),
        "prepend": prepend_tokenizer,
    }
    return lambda kind: makers[kind]()


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    return REPO / "models" / "octo_demo"


@pytest.fixture(scope="session")
def demo(demo_dir: Path) -> octo_tokenizer.Tokenizer:
    return octo_tokenizer.load_tokenizer(demo_dir)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A path in the shared data folder, or a skip with the reason."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.exists():
            pytest.skip(f"needs the shared data {name}, which is not beside this checkout")
        return path

    return find


@pytest.fixture(scope="session")
def qwen2_dir(shared: Callable[[str], Path]) -> Path:
    return shared("tokenizers/qwen2")


@pytest.fixture(scope="session")
def qwen2(qwen2_dir: Path) -> octo_tokenizer.Tokenizer:
    return octo_tokenizer.load_tokenizer(qwen2_dir)


@pytest.fixture(scope="session")
def llama2(shared: Callable[[str], Path]) -> octo_tokenizer.Tokenizer:
    return octo_tokenizer.load_tokenizer(shared("tokenizers/llama2"))


@pytest.fixture(scope="session")
def spm_model() -> Callable[..., bytes]:
    """Train a small SentencePiece BPE; the options are those of the trainer."""

    def train(**options: object) -> bytes:
        out = io.BytesIO()
        settings = {
            "vocab_size": 420,
            "model_type": "bpe",
            "byte_fallback": True,
            "minloglevel": 2,
            "hard_vocab_limit": False,
        }
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT), model_writer=out, **{**settings, **options}
        )
        return out.getvalue()

    return train
