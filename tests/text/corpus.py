"""Texts that tokenizers get wrong, and the plain text that the tiny vocabularies are trained on. All self-written."""

NASTY = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t\t x",
    " \n \n  \n",
    "Hello, world!",
    " leading space",
    "trailing space ",
    "two  spaces   three    four",
    "a" * 100,
    "=" * 70,
    " " * 130,
    "\n" * 40 + " " * 9 + "x",
    "I'm you're he'd we'll they've it's 'tis DON'T I'M She'Ll",
    "don\u2019t won\u2019t",
    "0 1 12 123 1234 12345 3.14159 1,000,000 -7 1e-5 0x1F \u00bd \u2168 \u0663\u0664\u0665 \uff11\uff12",
    "def f(x):\n    return x ** 2  # square\n\nif __name__ == '__main__':\n\tprint(f(3))\n",
    "<div class=\"a\">\r\n  &amp; </div>\r\n",
    "SELECT * FROM t WHERE a <> 'b' AND c >= 10;",
    "https://example.org/a?b=c&d=%20e#f",
    "\u00e9 e\u0301 \u00c5 A\u030a \ufb01 \u1e9b\u0323",
    "na\u00efve caf\u00e9 stra\u00dfe \u0130stanbul \u01c5",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u6771\u4eac\u30bf\u30ef\u30fc \u3072\u3089\u304c\u306a \ud55c\uad6d\uc5b4 \ud83d".encode("utf-8", "ignore").decode(),
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u061f \u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f4\U000e0067\U000e0062\U000e007f \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001f44d\U0001f3fd",
    "\u0000\u0001\u0002\u0003\u0004\u0005\u0006\u0007\b\u000b\f\u000e\u001b\u007f\u0080\u0085\u009f\u00a0\u00ad",
    "\u200b\u200e\u202e\u2028\u2029\u3000\ufeff\ufffd\uffff",
    "\u2581under \u2581 \u0120space \u010anl",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "text<|im_end|>text <|im_end|> <|im_start|><|im_start|>",
    "<|im_end|",
    "|im_end|> <| im_end |> <|IM_END|>",
    "<s>a</s> <s> </s><unk> <0x41> <0xZZ>",
    "<|endoftext|><repo_name>x<file_sep>y",
    "Mixed\u4e2d\u6587and\u65e5\u672c\u8a9ewords123abc!?\u3002",
    "!!! ??? ... --- *** ### $$$ %%% ^^^ &&& (((())))",
    "a.b,c;d:e!f?g'h\"i(j)k[l]m{n}o<p>q/r\\s|t~u`v@w#x$y%z^&*-_=+",
    "x\r\ny\rz\n\r",
    "CamelCase snake_case kebab-case SCREAMING_CASE mixedUPPERlower",
    "\U00010400\U0001d400 \U0002a6a5 \U0010ffff \ue000",
    "the quick brown fox jumps over the lazy dog. The end.",
    "aa aaa aaaa aaaaa aaaaaa aaaaaaa abab ababa ababab babab",
]

TRAINING = """The house has a kitchen, a garden and a long table where all of us sit down in the evening.
She said: "I don't know whether the train's late, but we'll see; it's 12:45 already."
Numbers such as 7, 12, 123, 2024 and 3.14 stand among words, and so do 1,000 and 50%.
def add(a, b):
    return a + b

for i in range(10):
    print(i, add(i, 1))

If you're there, they're there too; I've been there, he'd been there, she'll be there.
Das Haus hat einen Garten, gr\u00fcn und sch\u00f6n. Stra\u00dfe, M\u00e4dchen, Fr\u00fchst\u00fcck, caf\u00e9, na\u00efve.
La maison a un grand jardin, o\u00f9 l'on s'assoit le soir. \u00c7a va? Tr\u00e8s bien!
\u4f60\u597d\uff0c\u4e16\u754c\u3002\u5bb6\u91cc\u6709\u4e00\u4e2a\u82b1\u56ed\u3002 \u6771\u4eac\u306e\u5bb6\u306b\u306f\u5ead\u304c\u3042\u308b\u3002
\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645. \u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440. \u0393\u03b5\u03b9\u03b1 \u03c3\u03bf\u03c5.
A smile \U0001f600 and a heart \u2764\ufe0f and a family \U0001f468\u200d\U0001f469\u200d\U0001f467.
aa aaa aaaa aaaaa aaaaaa abab ababa ababab babab bababa abba baab
Again and again the water goes down the hill, again and again the wind goes over the water.
  two spaces,    four spaces,        eight spaces
\tone tab,\t\ttwo tabs
"""
