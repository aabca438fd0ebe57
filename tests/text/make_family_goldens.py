"""Makes chat-family-goldens.json: what transformers renders for the families' own chat templates.

    python -m venv venv && venv/bin/pip install -r tests/text/requirements.txt
    venv/bin/python tests/text/make_family_goldens.py FOLDER

FOLDER is the models folder of llama.cpp's source package: templates/*.jinja, and the templates inside its vocabulary-only
GGUF files. They are other people's text, so neither they nor what they print is written: only the length of each
rendering in bytes and the beginning of its SHA-256. With TEMPLATE CONVERSATION as further arguments the rendering is
printed instead.
"""

import hashlib
import itertools
import json
import pathlib
import sys

from gguf import GGUFReader

from make_chat_goldens import CONVERSATIONS, GOLDENS, TOOLS, render

REASONING = ("reasoning_content", "thinking", "reasoning")
EXTRA = {
    "turns": [
        {"role": "user", "content": "What is a prime?"},
        {"role": "assistant", "content": "A number with two divisors.\n"},
        {"role": "user", "content": "Is 91 one?\n\n"},
        {"role": "assistant", "content": "No: 7 \u00d7 13."},
        {"role": "user", "content": "And 97?"},
    ],
    "late-system": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Bye"},
    ],
    "only-system": [{"role": "system", "content": "You are terse."}],
    "developer": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
}


def conversations():
    for name, messages in (CONVERSATIONS | EXTRA).items():
        # A list of parts is joined before a template sees it where it cannot read one: that is another test's.
        if name != "parts":
            yield name, messages


def as_prepared(message):
    """Thoughts are known to templates under every name in use."""
    thought = next((message[name] for name in REASONING if name in message), None)
    if thought is None:
        return message
    first = {"thinking": thought} if "thinking" not in message else {}
    return first | message | {"reasoning_content": thought}


def templates(folder):
    for path in sorted((folder / "templates").glob("*.jinja")):
        yield path.stem, path.read_text()
    for path in sorted(folder.glob("ggml-vocab-*.gguf")):
        for key, field in GGUFReader(path).fields.items():
            if key.startswith("tokenizer.chat_template") and key != "tokenizer.chat_templates":
                yield path.stem + key.removeprefix("tokenizer.chat_template").replace(".", "-"), field.contents()


def short(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def main():
    goldens = {}
    wanted = sys.argv[2:4]
    for name, source in templates(pathlib.Path(sys.argv[1])):
        cases = []
        for (conversation, messages), tools, prompt in itertools.product(conversations(), [None, TOOLS], [False, True]):
            if tools and conversation not in ("one", "tools", "two-calls", "turns"):
                continue
            if "tool_calls" not in source and any(message["content"] is None for message in messages):
                continue  # an error, or "None", in transformers; we put an empty text there
            result = render(source, [as_prepared(message) for message in messages], tools, prompt)
            if wanted == [name, conversation]:
                print(json.dumps([bool(tools), prompt, result], ensure_ascii=False))
            case = [conversation, bool(tools), prompt]
            if "text" in result:
                case += ["text", len(result["text"].encode()), short(result["text"])]
            elif "raised" in result:
                case += ["raised", len(result["raised"].encode()), short(result["raised"])]
            else:
                case += ["error", 0, ""]
            cases.append(case)
        goldens[name] = cases
    if wanted:
        return
    rows = ",\n".join(f"{json.dumps(name)}:{json.dumps(cases, separators=(',', ':'))}" for name, cases in goldens.items())
    extra = json.dumps(EXTRA, ensure_ascii=True)
    (GOLDENS / "chat-family-goldens.json").write_text(f'{{"conversations":{extra},\n"templates":{{\n{rows}}}}}\n')
    print(sum(map(len, goldens.values())), "cases of", len(goldens), "templates")


main()
