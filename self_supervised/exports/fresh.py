"""Run in a process of its own: the code that loads an exported file, on images; nothing of this project is imported.

python -P exports/fresh.py CODE FILE IMAGES.npy EMBEDDINGS.npy
"""

import sys
from pathlib import Path

import numpy as np


def main(code: str, file: str, images: str, embeddings: str) -> None:
    """The first image alone, then the others: a program must take batches of any size."""
    inputs, found = np.load(images), []
    for batch in (inputs[:1], inputs[1:]):
        names = {"path": file, "images": batch}
        exec(Path(code).read_text(), names)
        found.append(np.asarray(names["embeddings"]))
    np.save(embeddings, np.concatenate(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
