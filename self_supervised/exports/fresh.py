"""Script that runs the loading code of an exported file on images, in a process without this project's modules.

python -P exports/fresh.py CODE FILE IMAGES.npy EMBEDDINGS.npy
"""

import sys
from pathlib import Path

import numpy as np


def main(code: str, file: str, images: str, embeddings: str) -> None:
    """Embed the first image alone, then the others: an exported program must accept batches of any size."""
    inputs = np.load(images)
    outputs = []
    for batch in (inputs[:1], inputs[1:]):
        names = {"path": file, "images": batch}
        exec(Path(code).read_text(), names)
        outputs.append(np.asarray(names["embeddings"]))
    np.save(embeddings, np.concatenate(outputs))


if __name__ == "__main__":
    main(*sys.argv[1:])
