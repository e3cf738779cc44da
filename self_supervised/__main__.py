"""Entry point of all programs: `self-supervised COMMAND ...`, or `python -m self_supervised COMMAND ...`."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from self_supervised import refuse_hidden_modules

COMMANDS = {  # name -> (module, description)
    "train": ("self_supervised.train", "pretrain an encoder, score it, and train a linear classifier on it"),
    "evaluate": ("self_supervised.evaluate", "score an encoder by standard protocols, next to a random encoder"),
    "classify": ("self_supervised.classify", "classify images, after learning from a few labeled ones"),
    "export": ("self_supervised.exports.export", "write an encoder in the format of another library, and verify it"),
    "embed": ("self_supervised.embeddings.embed", "compute the features of a directory of images or videos"),
    "nearest": ("self_supervised.embeddings.nearest", "find the nearest neighbors of images"),
    "map": ("self_supervised.embeddings.projection", "draw the features as a two-dimensional map"),
    "curves": ("self_supervised.report.curves", "draw the training curves of runs"),
    "compare": ("self_supervised.report.compare", "print scores, results and differing settings of runs as tables"),
    "report": ("self_supervised.report.report", "write an HTML page about one or more runs"),
    "demo": ("self_supervised.demo", "train on small images of digits, in a minute"),
}


def help_page() -> str:
    """Return the text of `self-supervised --help`."""
    rows = [f"  {name:10}{description}" for name, (_, description) in COMMANDS.items()]
    usage = "usage: self-supervised COMMAND ..."
    return "\n".join([usage, "", *rows, "", "self-supervised COMMAND --help lists the options of a command."])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names."""
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("-h", "--help"):
        print(help_page())
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Choose from {', '.join(COMMANDS)}."
        print(f"error: command={name}: unknown command. {remedy}", file=sys.stderr)
        raise SystemExit(2)
    from self_supervised.program import one_line_errors  # takes a second; --help does not need it

    with one_line_errors():  # `main` has its own
        refuse_hidden_modules()
        program = importlib.import_module(COMMANDS[name][0])
    program.main(rest)


if __name__ == "__main__":
    main()
