"""``python -m curvext``: the commands of the library."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import __version__, demo, support
from .demo import train


class Command(NamedTuple):
    """A command: one line of help, its description, and two functions that declare its options and run it."""

    help: str
    description: str | None
    arguments: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], object]


def _path(parser: argparse.ArgumentParser) -> Any:
    return parser.add_argument("path", nargs="?", default="-", help="file to write ('-', the default: print)")


COMMANDS = {
    "demo": Command(
        "train on real data; compare curvature, optimizers and costs, in tables and figures",
        demo.__doc__,
        demo.arguments,
        demo.main,
    ),
    "support": Command(
        "the table of supported operations, from the registry",
        "Write the table of supported operations, generated from the registry of rules.",
        _path,
        lambda args: support.write(args.path),
    ),
    "train": Command(
        "compare optimizers on a data set, with a table, a plot and JSON",
        train.__doc__,
        train.arguments,
        train.main,
    ),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m curvext", description="Curvature along with loss.backward().")
    top.add_argument("--version", action="version", version=f"curvext {__version__}")
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            help=command.help,
            description=command.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(sub)
        sub.set_defaults(run=command.run)
    return top


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command."""
    args = parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
