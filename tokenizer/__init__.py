"""Text to token ids and back: SentencePiece and tokenizers back ends, chat templates, streaming decoding.

>>> tok = load_tokenizer(model_dir)
>>> ids = tok.chat([{"role": "user", "content": "Hello"}])      # special ids come from the template only
>>> detokenizer = tok.stream()
>>> text = "".join(detokenizer.push(i) for i in ids) + detokenizer.finish()

Nothing here imports torch, unpickles or runs code of a model repository (chat templates run in an interpreter of our
own, `template`, with a budget).
"""

from octo_run.tokenizer.chat import ChatTemplate
from octo_run.tokenizer.stream import StreamingDetokenizer
from octo_run.tokenizer.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ChatTemplate", "StreamingDetokenizer", "Tokenizer", "load_tokenizer"]
