"""Seconds until one can begin: `import moco` against importing torch, torchvision and Lightning; a default model.

    python -m benchmarks.startup

Each in fresh interpreters, in turns. To reach: the import in under 1.5x the time of the three packages; constructing
`SelfSupervisedMethod()` under 2 seconds beyond that; both are needed before the first batch of a notebook.
"""

import subprocess
import sys
from collections.abc import Callable

from benchmarks import harness

PACKAGES = "import torch, torchvision, pytorch_lightning"
PROGRAMS = {
    PACKAGES: PACKAGES,
    "import moco": "import moco",
    "import moco; SelfSupervisedMethod()": "import moco; moco.SelfSupervisedMethod()",
}


def interpreter(program: str) -> Callable[[], None]:
    return lambda: subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True) and None


def main(argv: list[str] | None = None) -> list[harness.Row]:
    options = harness.arguments(__doc__, rounds=5).parse_args(argv)
    runs = {name: interpreter(program) for name, program in PROGRAMS.items()}
    times = harness.in_turns(runs, 1 if options.quick else options.rounds, warmup=0 if options.quick else 1)
    base, imported, built = times.values()
    rows = [
        {"what": name, "seconds": seconds, "x the packages": seconds / base, "to reach": ""}
        for name, seconds in times.items()
    ]
    rows[1]["to reach"] = "under 1.5x"
    rows[2]["to reach"] = f"under 2 s beyond the import (here {built - imported:.2f} s)"
    harness.report("startup", rows, options.out, "torchvision", "pytorch_lightning")
    return rows


if __name__ == "__main__":
    main()
