"""Makes vocabulary-goldens.json: what the originals make of nasty texts with the families' real vocabularies.

    python -m venv venv && venv/bin/pip install -r tests/text/requirements.txt
    venv/bin/python tests/text/make_vocabulary_goldens.py FOLDER [MORE.gguf ...]

FOLDER holds the vocabulary-only GGUF files (ggml-vocab-*.gguf) of llama.cpp's source package. For SentencePiece's kinds
the vocabulary becomes a SentencePiece model again and sentencepiece's own C++ code encodes; for the others a naive
encoder (the `regex` module with the expression of the family's tokenizer.json, and a loop over the merges). Only ids are
written, no vocabulary. MORE files are encoded too, but go to standard output's summary only.
"""

import json
import pathlib
import sys
import unicodedata

import regex
import sentencepiece
from gguf import GGUFReader
from sentencepiece import sentencepiece_model_pb2

import corpus

GOLDENS = pathlib.Path(__file__).resolve().parents[2] / "crates" / "engine" / "tests" / "text"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
# `tokenizers` counts ASCII symbols as punctuation too.
PUNCTUATION = r"[\p{P}!-/:-@\[-`{-~]+"

# For each: whether NFC comes first, the expressions in turn (matches and what is between them are pieces; BYTES: from here
# on they see the byte-level alphabet instead of characters), and whether a piece that is a token stays whole.
BYTES = None
CUTS = {
    "gpt-2": (False, [GPT2], False),
    "mpt": (True, [GPT2], False),
    "smollm": (False, [r"\p{N}", GPT2], False),
    "command-r": (True, [r"\p{N}", GPT2], False),
    "llama-bpe": (False, [LLAMA3], True),
    "qwen2": (True, [QWEN2], False),
    "qwen35": (True, [QWEN35], False),
    "falcon": (False, [PUNCTUATION, GPT2, BYTES, r"\p{N}+", "[0-9][0-9][0-9]"], False),
    "deepseek-coder": (
        False, [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"], False,
    ),
}
ALIASES = {"starcoder": "smollm", "refact": "smollm"}
UNWRITTEN = {"gptneox": "mpt", "llama": "gpt-2"}


def bytes_to_unicode():
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def merged(parts, ranks):
    """The best-ranked adjacent pair, leftmost first, until none is left."""
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts = parts[:i] + [parts[i] + parts[i + 1]] + parts[i + 2 :]


def sections(fields, names, types):
    """Cuts a text at added tokens, the longest first; odd entries are tokens."""
    ends = [fields[key].contents() for key in ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id") if key in fields]
    is_added = lambda i: i in ends or types[i] in (CONTROL, USER_DEFINED, UNKNOWN)
    added = [name for i, name in enumerate(names) if is_added(i) and name]
    if not added:
        return lambda text: [text]
    expression = regex.compile("(" + "|".join(map(regex.escape, sorted(added, key=len, reverse=True))) + ")")
    return expression.split


def ranks_of(fields):
    cut = lambda merge: (merge[: merge.index(" ", 1)], merge[merge.index(" ", 1) + 1 :])
    return {cut(merge): rank for rank, merge in enumerate(fields["tokenizer.ggml.merges"].contents())}


def byte_level(fields, names, types):
    architecture = fields["general.architecture"].contents()
    pre = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else UNWRITTEN[architecture]
    if (pre := ALIASES.get(pre, pre)) not in CUTS:
        return None
    nfc, expressions, keeps_tokens = CUTS[pre]
    vocabulary = {name: i for i, name in enumerate(names)}
    ranks, spell, split = ranks_of(fields), bytes_to_unicode(), sections(fields, names, types)

    def pieces(text, expressions):
        if not expressions:
            return ["".join(spell[byte] for byte in text.encode())] if text else []
        if expressions[0] is BYTES:
            text = "".join(spell[byte] for byte in text.encode())
            return spelled_pieces(text, expressions[1:])
        return cut(text, expressions, pieces)

    def spelled_pieces(text, expressions):
        return cut(text, expressions, spelled_pieces) if expressions else [text] if text else []

    def cut(text, expressions, pieces):
        end, found = 0, []
        for match in regex.finditer(expressions[0], text):
            found += [text[end : match.start()], match.group()]
            end = match.end()
        return [piece for part in found + [text[end:]] if part for piece in pieces(part, expressions[1:])]

    def encode(text):
        ids = []
        for index, section in enumerate(split(text)):
            if index % 2:
                ids.append(vocabulary[section])
                continue
            section = unicodedata.normalize("NFC", section) if nfc else section
            for spelled in pieces(section, expressions):
                if keeps_tokens and spelled in vocabulary:
                    ids.append(vocabulary[spelled])
                else:
                    ids += [vocabulary[part] for part in merged(list(spelled), ranks) if part in vocabulary]
        return ids

    return encode


def characters(fields, names, types):
    """Gemma 4: BPE over characters with visible spaces, bytes for characters without a token."""
    vocabulary = {name: i for i, name in enumerate(names)}
    ranks, split = ranks_of(fields), sections(fields, names, types)

    def encode(text):
        ids = []
        for index, section in enumerate(split(text)):
            if index % 2:
                ids.append(vocabulary[section])
                continue
            for part in merged(list(section.replace(" ", "\u2581")), ranks):
                ids += [vocabulary[part]] if part in vocabulary else [vocabulary[f"<0x{b:02X}>"] for b in part.encode()]
        return ids

    return encode


def sentence_piece(fields, names, types, model_type):
    flag = lambda name, default: fields[f"tokenizer.ggml.{name}"].contents() if f"tokenizer.ggml.{name}" in fields else default
    scores = fields["tokenizer.ggml.scores"].contents()
    unknown = flag("unknown_token_id", types.index(UNKNOWN) if UNKNOWN in types else 0)
    proto = sentencepiece_model_pb2.ModelProto()
    for i, (name, score, kind) in enumerate(zip(names, scores, types)):
        # SentencePiece knows one unknown token; further ones are padding.
        kind = UNKNOWN if i == unknown else UNUSED if kind == UNKNOWN else kind
        proto.pieces.add(piece=name.replace(" ", "\u2581") or "\ufffd", score=score, type=kind)
    proto.trainer_spec.model_type = model_type
    proto.trainer_spec.byte_fallback = BYTE in types
    proto.trainer_spec.unk_id = unknown
    proto.trainer_spec.unk_piece = names[proto.trainer_spec.unk_id]
    proto.trainer_spec.vocab_size = len(names)
    proto.normalizer_spec.add_dummy_prefix = flag("add_space_prefix", True)
    proto.normalizer_spec.remove_extra_whitespaces = flag("remove_extra_whitespaces", False)
    proto.normalizer_spec.precompiled_charsmap = bytes(b & 255 for b in flag("precompiled_charsmap", []))
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    # SentencePiece takes names of control tokens in a text for text, transformers and we don't: left out.
    marks = [name for name, kind in zip(names, types) if kind in (CONTROL, UNKNOWN)] + ["<0x", "\0"]
    return lambda text: None if any(mark in text for mark in marks) else processor.encode(text)


def encoder(path):
    fields = GGUFReader(path).fields
    names, types = (fields["tokenizer.ggml." + key].contents() for key in ("tokens", "token_type"))
    match fields["tokenizer.ggml.model"].contents():
        case "gpt2":
            return byte_level(fields, names, types)
        case "gemma4":
            return characters(fields, names, types)
        case "llama":
            return sentence_piece(fields, names, types, 2)
        case "t5":
            return sentence_piece(fields, names, types, 1)
    return None


def main():
    texts = corpus.NASTY + [corpus.TRAINING]
    files = sorted(pathlib.Path(sys.argv[1]).glob("ggml-vocab-*.gguf")) + [pathlib.Path(path) for path in sys.argv[2:]]
    goldens = {}
    for path in files:
        encode = encoder(path)
        if encode:
            goldens[path.name] = [encode(text) for text in texts]
        print(path.name, sum(ids is not None for ids in goldens.get(path.name, [])), "texts")
    rows = (f"{json.dumps(name)}:{json.dumps(ids, separators=(',', ':'))}" for name, ids in goldens.items())
    body = ",\n".join(rows)
    text = f'{{"texts":{json.dumps(texts, ensure_ascii=True)},\n"ids":{{{body}}}}}\n'
    (GOLDENS / "vocabulary-goldens.json").write_text(text)
    print(len(text), "bytes")


main()
