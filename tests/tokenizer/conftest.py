"""Small tokenizers made on the spot, and the shared data where it lies beside the checkout."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

import octo_run.tokenizer as octo_tokenizer

REPO = Path(__file__).resolve().parents[2]
DATA = REPO.parent / "shared" / "data"
TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "She sells sea shells by the sea shore; 1984 was a year like 2024.",
    "def main():\n    return {'user': 'assistant', 'end': [1, 2, 3]}\n",
    "Äpfel und Birnen, crème brûlée, 你好世界, привет мир, <im> end start |user|",
] * 8


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
