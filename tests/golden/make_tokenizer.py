"""Writes tests/checkpoints/tokenizer.json: bytes, four specials and four merges, ids as `twins.py` gives them to GGUF files.

The checkpoints have no tokenizer of their own; where one must be there (a server, a converter), this is put beside them.
Visible ASCII comes first, so that the first 101 or 128 ids make a vocabulary too.
"""

import json
import pathlib

from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]
MERGES = [("i", "n"), ("e", "r"), ("t", "h"), ("a", "n")]
FILE = pathlib.Path(__file__).resolve().parent.parent / "checkpoints" / "tokenizer.json"


def tokens():
    """Names by id."""
    letters = sorted(bytes_to_unicode().values(), key=lambda letter: (not letter.isascii(), ord(letter)))
    return SPECIALS + [left + right for left, right in MERGES] + letters


def tokenizer():
    added = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, name in enumerate(SPECIALS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {name: i for i, name in enumerate(tokens())}, "merges": [list(merge) for merge in MERGES],
    }
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model,
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(tokenizer(), ensure_ascii=False, separators=(",", ":")) + "\n")
