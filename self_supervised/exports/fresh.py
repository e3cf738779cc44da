"""Script that runs the loading code of an exported file on images, in a process without this project's modules.

python -P exports/fresh.py CODE FILE IMAGES.npy OUTPUTS.npz embeddings
"""

import sys
from pathlib import Path

import numpy as np


def main(code: str, file: str, images: str, outputs: str, *names: str) -> None:
    """Embed the first image alone, then the others: an exported program must accept batches of any size.

    Args:
        names: variables of the code to write.
    """
    inputs = np.load(images)
    parts = []
    for batch in (inputs[:1], inputs[1:]):
        variables = {"path": file, "images": batch}
        exec(Path(code).read_text(), variables)
        parts.append(variables)
    np.savez(outputs, **{name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in names})


if __name__ == "__main__":
    main(*sys.argv[1:])
