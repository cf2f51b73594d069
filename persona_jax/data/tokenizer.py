"""Trains a small CLIP tokenizer on captions: byte-level BPE in CLIP's file layout."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD = "</w>"
# CLIP's pre-tokenization: contractions, letters, single digits, other marks.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def learn_tokenizer(captions: Sequence[str], vocab_size: int, length: int, folder: Path) -> None:
    """Writes ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json`` into `folder`.

    The vocabulary holds all bytes (512 entries), so that any text can be encoded; then merges
    trained on `captions`; then the two special tokens, which have the last ids as in CLIP.

    Args:
      captions: training text.
      vocab_size: upper limit of the vocabulary, 514 or more.
      length: tokens of a prompt, start and end included.
      folder: created if absent.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_WORD))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix=_WORD, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*letters, *(letter + _WORD for letter in letters)]
    free = vocab_size - len(entries) - 2
    merges = merges[: max(free, 0)]
    # Two merges can produce the same token; it keeps its first id.
    entries = list(dict.fromkeys([*entries, *("".join(merge) for merge in merges), START, END]))
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
