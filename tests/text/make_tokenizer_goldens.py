"""Makes the tokenizer goldens: tiny GGUF vocabularies with the ids their originals give, and ids for the default model.

    python -m venv venv && venv/bin/pip install -r tests/text/requirements.txt
    venv/bin/python tests/text/make_tokenizer_goldens.py [default-model.gguf]

Originals: byte-level BPE is trained and encoded by the Python `tokenizers` package with the pipeline that the named
family's tokenizer.json has; SentencePiece by the `sentencepiece` package, whose own C++ code encodes and decodes. For
the default model the ids come from a naive encoder in this file (the `regex` module and a loop over the merges) and are
checked against `tokenizers` with SmolLM2's published pipeline (digits one by one, then GPT-2's expression, no normalizer).
"""

import base64
import io
import json
import pathlib
import random
import sys
import tempfile

import regex
import sentencepiece
from gguf import GGUFReader, GGUFWriter
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import corpus

GOLDENS = pathlib.Path(__file__).resolve().parents[2] / "crates" / "engine" / "tests" / "text"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def qwen2():
    return LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=use_regex)


def split(expression):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), byte_level(False)])


FAMILIES = {
    "gpt-2": (None, byte_level(True)),
    "smollm": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)])),
    "llama-bpe": (None, split(LLAMA3)),
    "qwen2": (normalizers.NFC(), split(qwen2())),
}
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<tool>", "  !!"]


def cases(encode, decode, texts):
    """Every text with its ids and what the ids say, where that is not the text."""
    for text in texts:
        ids = encode(text)
        decoded = decode(ids)
        yield {"text": text, "ids": ids} | ({} if decoded == text else {"decoded": decoded})


def train_byte_level():
    """One vocabulary for all families, so that what differs is the cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level(True)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        special_tokens=CONTROLS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus.TRAINING.splitlines(keepends=True) * 2, trainer)
    return json.loads(tokenizer.to_str())["model"]


def make_byte_level():
    model = train_byte_level()
    names = sorted(model["vocab"], key=model["vocab"].get) + ADDED
    types = [CONTROL if name in CONTROLS else USER_DEFINED if name in ADDED else NORMAL for name in names]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]

    writer = GGUFWriter(GOLDENS / "byte-level.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    write(writer)

    goldens = {}
    for family, (normalizer, pre_tokenizer) in FAMILIES.items():
        tokenizer = Tokenizer(
            models.BPE(vocab=dict(model["vocab"]), merges=merges, ignore_merges=family == "llama-bpe")
        )
        if normalizer:
            tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in CONTROLS])
        tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ADDED])
        texts = corpus.NASTY + [corpus.TRAINING, "x  !!  !!! <tool>a <tool>"]
        decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
        found = list(cases(lambda text: tokenizer.encode(text).ids, decode, texts))
        # Most families cut most texts alike: only what differs from the first is written down.
        first = goldens.get("gpt-2", [])
        goldens[family] = [case for case in found if case not in first]
        # tokenizer.json itself, for loading from a folder
        if family == "smollm":
            tokenizer.save(str(GOLDENS / "folder" / "tokenizer.json"), pretty=False)
    dump("byte-level.json", goldens)


def train_sentence_piece(model_type, vocab_size, add_dummy_prefix, user_defined, remove_extra_whitespaces):
    buffer = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as text:
        text.write(corpus.TRAINING * 2)
        text.flush()
        sentencepiece.SentencePieceTrainer.train(
            input=text.name,
            model_writer=buffer,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=remove_extra_whitespaces,
            add_dummy_prefix=add_dummy_prefix,
            allow_whitespace_only_pieces=True,
            character_coverage=0.98,
            user_defined_symbols=user_defined,
            max_sentence_length=100000,
            minloglevel=2,
        )
    # The model names its input, which is a temporary file.
    model = sentencepiece_model_pb2.ModelProto.FromString(buffer.getvalue())
    del model.trainer_spec.input[:]
    model = model.SerializeToString(deterministic=True)
    return model, sentencepiece.SentencePieceProcessor(model_proto=model)


def make_sentence_piece(name, add_dummy_prefix, user_defined):
    """`llama`-like: BPE with byte fallback, text as it is (identity, no white space removed)."""
    buffer, processor = train_sentence_piece("bpe", 620, add_dummy_prefix, user_defined, remove_extra_whitespaces=False)
    if name == "sentencepiece":
        folder = GOLDENS / "sentencepiece-folder"
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.model").write_bytes(buffer)
    num_tokens = processor.get_piece_size()
    kind = lambda i: (
        UNKNOWN if processor.is_unknown(i)
        else BYTE if processor.is_byte(i)
        else CONTROL if processor.is_control(i)
        else USER_DEFINED if processor.id_to_piece(i) in user_defined
        else NORMAL
    )
    kinds = [kind(i) for i in range(num_tokens)]
    spell = lambda i: processor.id_to_piece(i).replace("\u2581", " ") if kinds[i] == USER_DEFINED else processor.id_to_piece(i)

    writer = GGUFWriter(GOLDENS / f"{name}.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([spell(i) for i in range(num_tokens)])
    writer.add_token_scores([processor.get_score(i) for i in range(num_tokens)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(processor.bos_id())
    writer.add_eos_token_id(processor.eos_id())
    writer.add_unk_token_id(processor.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(add_dummy_prefix)
    write(writer)

    # sentencepiece takes control tokens in a text for ordinary text, so texts with them are another test's.
    texts = [text for text in corpus.NASTY if not any(mark in text for mark in ("<s>", "<0x", "\u2581", "\0"))]
    rng = random.Random(7)
    texts += ["".join(rng.choice("ab aab\u00e9\U0001f600") for _ in range(rng.randrange(1, 40))) for _ in range(60)]
    texts += [" ".join(rng.sample(corpus.TRAINING.split(), 12)) for _ in range(20)]
    goldens = list(cases(processor.encode, processor.decode, texts))
    # Random ids: what sentencepiece makes of byte tokens that are no UTF-8.
    printable = [i for i in range(num_tokens) if kinds[i] in (BYTE, NORMAL)]
    bytes_only = [i for i in range(num_tokens) if kinds[i] == BYTE]
    for _ in range(60):
        ids = [rng.choice(bytes_only if rng.random() < 0.7 else printable) for _ in range(rng.randrange(1, 12))]
        # A first byte token for a space: sentencepiece keeps the space, transformers' decoder drops it, and so do we.
        if processor.id_to_piece(ids[0]) != "<0x20>":
            goldens.append({"ids": ids, "decoded": processor.decode(ids)})
    dump(f"{name}.json", goldens)


def make_unigram():
    """SentencePiece's other kind, with superfluous spaces dropped, as a folder with nothing but tokenizer.model."""
    buffer, processor = train_sentence_piece("unigram", 430, True, ["<tool>"], remove_extra_whitespaces=True)
    folder = GOLDENS / "unigram-folder"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(buffer)
    texts = [text for text in corpus.NASTY if not any(mark in text for mark in ("<s>", "<0x", "\u2581", "\0"))]
    rng = random.Random(11)
    texts += [" ".join(rng.sample(corpus.TRAINING.split(), 12)) for _ in range(40)] + [corpus.TRAINING]
    dump("unigram.json", list(cases(processor.encode, processor.decode, texts)))


def make_tiktoken():
    """A list of byte strings by rank, and tiktoken's algorithm: the adjacent pair whose joined string ranks best."""
    names = sorted((vocabulary := train_byte_level()["vocab"]), key=vocabulary.get)
    unspell = {char: byte for byte, char in bytes_to_unicode().items()}
    strings = [bytes(unspell[char] for char in name) for name in names if name not in CONTROLS]
    ranks = {string: rank for rank, string in enumerate(strings)}
    folder = GOLDENS / "tiktoken-folder"
    folder.mkdir(exist_ok=True)
    lines = (f"{base64.b64encode(string).decode()} {rank}\n" for string, rank in ranks.items())
    (folder / "tiny.tiktoken").write_text("".join(lines))
    # Added tokens begin behind a hole in the id space, as LLaMA 3's do.
    added = {str(len(strings) + 3 + i): {"content": name, "special": True} for i, name in enumerate(CONTROLS)}
    config = {"added_tokens_decoder": added, "bos_token": CONTROLS[0], "eos_token": CONTROLS[2], "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
    special = regex.compile("(" + "|".join(map(regex.escape, CONTROLS)) + ")")

    def encode(text):
        ids = []
        for index, section in enumerate(special.split(text)):
            if index % 2:
                ids.append(len(strings) + 3 + CONTROLS.index(section))
                continue
            for piece in regex.findall(LLAMA3, section):
                parts = [piece.encode()] if piece.encode() in ranks else [bytes([byte]) for byte in piece.encode()]
                while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]:
                    _, i = min(pairs)
                    parts[i : i + 2] = [parts[i] + parts[i + 1]]
                ids += [ranks[part] for part in parts]
        return ids

    dump("tiktoken.json", [{"text": text, "ids": encode(text)} for text in corpus.NASTY + [corpus.TRAINING]])


def make_tokenizer_files():
    """tokenizer.json in the manner of the families, each with what the Python package makes of the nasty texts."""
    sp = GOLDENS / "sentencepiece-folder" / "tokenizer.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sp))
    pieces = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    normal = {p: i for p, i in pieces.items() if not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i))}
    splits = [(p[:k], p[k:]) for p in normal for k in range(1, len(p)) if p[:k] in normal and p[k:] in normal]
    splits.sort(key=lambda pair: (-processor.get_score(pieces[pair[0] + pair[1]]), -len(pair[0])))
    byte_model = train_byte_level()
    byte_merges = [tuple(merge) for merge in byte_model["merges"]]
    visible = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    stripped = decoders.Sequence(visible + [decoders.Strip(" ", 1, 0)])

    def sentence(normalizer, pre_tokenizer, decoder):
        tokenizer = Tokenizer(models.BPE(pieces, splits, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer, tokenizer.decoder = normalizer, decoder
        if pre_tokenizer:
            tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
        return tokenizer

    def falcon():
        tokenizer = Tokenizer(models.BPE(byte_model["vocab"], byte_merges))
        digits = [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")]
        punctuation = pre_tokenizers.Punctuation("contiguous")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([punctuation, byte_level(True), *digits])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in CONTROLS])
        return tokenizer

    def llama3():
        tokenizer = Tokenizer(models.BPE(byte_model["vocab"], byte_merges, ignore_merges=True))
        tokenizer.pre_tokenizer, tokenizer.decoder = split(LLAMA3), decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in CONTROLS])
        first = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])
        return tokenizer

    legacy = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    phi3 = sentence(legacy, None, stripped)
    phi3.add_special_tokens([AddedToken(name, normalized=False, rstrip=True) for name in ("<|user|>", "<|end|>")])
    gemma = sentence(
        normalizers.Replace(" ", "\u2581"), pre_tokenizers.Split(" ", "merged_with_previous"), decoders.Sequence(visible)
    )
    gemma.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("\u2581\u2581", normalized=False)])
    first = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    styles = {
        "llama-2": sentence(legacy, None, stripped),
        "mistral-v3": sentence(None, first, stripped),
        "gemma": gemma,
        "phi-3": phi3,
        "falcon": falcon(),
        "llama-3": llama3(),
    }
    texts = corpus.NASTY + ["<|user|>\n hi<|end|> \n<|user|>", "a\n\nb  c</s> d</s>e"]
    goldens = {}
    for name, tokenizer in styles.items():
        decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
        rows = list(cases(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, decode, texts))
        goldens[name] = {"file": json.loads(tokenizer.to_str()), "with_special": tokenizer.encode("hi").ids, "cases": rows}
    dump("tokenizer-files.json", goldens)


def bytes_to_unicode():
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def naive_encoder(names, types, merges):
    """Byte-level BPE as it reads in the paper: the best-ranked adjacent pair, leftmost first, until none is left."""
    vocabulary = {name: i for i, name in enumerate(names)}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    spell = bytes_to_unicode()
    special = regex.compile("(" + "|".join(regex.escape(n) for n, t in zip(names, types) if t == CONTROL) + ")")

    def word(piece):
        parts = [spell[byte] for byte in piece.encode() if spell[byte] in vocabulary]
        while True:
            pairs = [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
            if not pairs:
                return [vocabulary[part] for part in parts]
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    def encode(text):
        ids = []
        for index, section in enumerate(special.split(text)):
            if index % 2:
                ids.append(vocabulary[section])
                continue
            for piece in regex.split(r"(\p{N})", section):
                for match in regex.findall(GPT2, piece):
                    ids += word(match)
        return ids

    return encode


def make_default_model(path):
    fields = GGUFReader(path).fields
    names, types, merges = (fields["tokenizer.ggml." + key].contents() for key in ("tokens", "token_type", "merges"))
    naive = naive_encoder(names, types, merges)
    tokenizer = Tokenizer(
        models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[tuple(merge.split(" ")) for merge in merges])
    )
    tokenizer.pre_tokenizer = FAMILIES["smollm"][1]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(n, normalized=False) for n, t in zip(names, types) if t == CONTROL])
    texts = corpus.NASTY + [corpus.TRAINING]
    for text in texts:
        assert naive(text) == tokenizer.encode(text).ids, f"the two originals disagree on {text!r}"
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    dump("default-model.json", list(cases(naive, decode, texts)))


def write(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dump(name, value):
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    (GOLDENS / name).write_text(text.replace('{"text"', '\n{"text"').replace('{"ids"', '\n{"ids"') + "\n")


def main():
    (GOLDENS / "folder").mkdir(parents=True, exist_ok=True)
    make_byte_level()
    make_unigram()
    make_tiktoken()
    make_sentence_piece("sentencepiece", True, ["<tool>"])
    make_sentence_piece("sentencepiece-no-prefix", False, ["<tool>", "\u2581\u2581\u2581\u2581"])
    make_tokenizer_files()
    if len(sys.argv) > 1:
        make_default_model(sys.argv[1])


main()
