"""Adds Gaussian noise to the matrices of a GGUF file in f32, in place.

Published weights that were quantised once lie on a grid, and the format that has that grid is exact on them. Noise of a few
per cent of each matrix' root mean square takes the grid away; what comes out is a model of its own, the base of
`cargo xtask bench-quantize`. The same seed gives the same file.
"""

import sys

import numpy as np
from gguf import GGUFReader


def main(path: str, share: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    reader = GGUFReader(path, "r+")
    for tensor in reader.tensors:
        if tensor.data.ndim < 2 or tensor.data.dtype != np.float32:
            continue
        deviation = share * float(np.sqrt(np.mean(np.square(tensor.data, dtype=np.float64))))
        # Row by row: a vocabulary's matrix would take gigabytes at once.
        for row in tensor.data:
            row += random.standard_normal(row.shape, dtype=np.float32) * np.float32(deviation)
    reader.data.flush()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: noise.py FILE.gguf SHARE SEED")
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
