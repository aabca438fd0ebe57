"""Makes crates/model/tests/weights/ggml_blocks.json: what the gguf package reads out of made-up blocks.

    golden-venv/bin/python tests/golden/ggml_blocks.py

For each of ggml's types that candle does not read (those it reads are compared at test time): the bytes are SplitMix64's,
seeded with the type's id, one byte a number; the f16 of each block is made finite, and so is MXFP4's exponent. Kept are the
FNV-1a hash of the f32 values (-0 as 0) and the first four of them.
"""

import json
import pathlib

import gguf
import numpy as np

FILE = pathlib.Path(__file__).resolve().parent.parent.parent / "crates/model/tests/weights/ggml_blocks.json"
NUM_BLOCKS = 1024
TYPES = "IQ4_NL IQ4_XS MXFP4 TQ2_0 TQ1_0 IQ3_S IQ3_XXS IQ2_S IQ2_XS IQ2_XXS IQ1_M IQ1_S".split()
LAST = ("TQ2_0", "TQ1_0", "IQ1_M")  # whose f16 ends the block; it begins the others


def blocks(name, count):
    with np.errstate(over="ignore"):
        state = np.uint64(gguf.GGMLQuantizationType[name].value) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (z ^ (z >> np.uint64(31))).astype(np.uint8)


def fnv(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def main():
    expected = {}
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        size = gguf.GGML_QUANT_SIZES[kind][1]
        data = blocks(name, NUM_BLOCKS * size).reshape(NUM_BLOCKS, size)
        if name == "MXFP4":
            data[:, 0] %= 253
        else:
            data[:, -1 if name in LAST else 1] &= 0xBF
        values = gguf.quants.dequantize(data, kind).astype(np.float32).reshape(-1) + np.float32(0.0)
        assert np.isfinite(values).all()
        expected[name] = [fnv(values.tobytes()), [float(value) for value in values[:4]]]
        print(name, expected[name])
    FILE.write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
