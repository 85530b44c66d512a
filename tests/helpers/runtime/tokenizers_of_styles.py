"""Small tokenizers of the styles that language models have, trained on a few lines."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "The quick brown fox doesn't jump over the lazy dog, it said.",
    "naïve café über straße — 日本語 emoji 🦊🦊 and tabs\tand  double  spaces\n",
    "def f(x):\n    return x ** 2  # don't ask; I've no idea, we're done!",
] * 5
SPECIAL = ["<s>", "</s>", "<|user|>"]
STYLES = ("byte-level", "metaspace", "byte-fallback", "gemma", "wordpiece", "suffix", "plain")


@cache
def tokenizer(style: str) -> Tokenizer:
    """Tokenizer of a style, with special tokens 0 to 2 and the added token <tool> that is not special."""
    made: Tokenizer = globals()["_" + style.replace("-", "_")]()
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    made.post_processor = processors.Sequence([
        *([made.post_processor] if made.post_processor else []),
        processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
    ])  # fmt: skip
    return made


def fast(style: str, **options: object) -> PreTrainedTokenizerFast:
    """The same as transformers has it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(style),
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<|user|>"],
        **options,
    )


def _byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(made, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet))
    return made


def _metaspace() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    _train(made, trainers.UnigramTrainer(vocab_size=120, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>"))
    return made


def _byte_fallback() -> Tokenizer:
    return _llama([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def _gemma() -> Tokenizer:
    return _llama([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _llama(parts: list[decoders.Decoder]) -> Tokenizer:
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="</s>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(parts)
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    _train(made, trainers.BpeTrainer(vocab_size=360, special_tokens=special))
    vocabulary = made.get_vocab()
    # Bytes are tokens of the model, not special ones.
    again = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="</s>"))
    again.normalizer, again.decoder = made.normalizer, made.decoder
    again.add_special_tokens(SPECIAL)
    return again


def _wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=True)
    _train(made, trainers.WordPieceTrainer(vocab_size=140, special_tokens=[*SPECIAL, "<unk>"]))
    return made


def _suffix() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.BPEDecoder()
    _train(made, trainers.BpeTrainer(vocab_size=140, special_tokens=[*SPECIAL, "<unk>"], end_of_word_suffix="</w>"))
    return made


def _plain() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    _train(made, trainers.WordLevelTrainer(special_tokens=[*SPECIAL, "<unk>"]))
    return made


def _train(made: Tokenizer, trainer: Any) -> None:
    trainer.show_progress = False
    made.train_from_iterator(LINES, trainer)
