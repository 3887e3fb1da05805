"""The command line: `wngen COMMAND ...`.

A command is a function of the words after its name, in one of the files beside this one, and stands in `COMMANDS`. The
first line of its docstring is its help. What a user got wrong it raises as a ValueError, with a message that says so.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable

from lightning_fabric.utilities.exceptions import MisconfigurationException

from wngen.arguments import nearest, summary
from wngen.cli.auditing import audit
from wngen.cli.fitting import fit
from wngen.cli.likelihoods import evaluate, score
from wngen.cli.listing import configs, models, published
from wngen.cli.pictures import complete, interpolate, reconstruct, sample
from wngen.cli.reporting import report
from wngen.cli.scaling import critical_batch

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    command.__name__.replace("_", "-"): command
    for command in (
        fit,
        evaluate,
        score,
        audit,
        report,
        sample,
        complete,
        reconstruct,
        interpolate,
        critical_batch,
        models,
        configs,
        published,
    )
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 if it went well, 1 for an error with a message, 2 for wrong arguments, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print("usage: wngen COMMAND ...\n")
        for command, function in COMMANDS.items():
            print(f"  {command:14} {summary(function)}")
        print("\n`wngen COMMAND --help` says more.")
        return 0
    if name not in COMMANDS:
        print(f"wngen: error: no command {name!r}{nearest(name, COMMANDS)}; `wngen --help` lists them", file=sys.stderr)
        return 2
    _quieten()
    try:
        COMMANDS[name](rest)
    except KeyboardInterrupt as stopped:
        print(f"\nwngen {name}: interrupted{stopped}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, MisconfigurationException) as error:
        if os.environ.get("WNGEN_TRACEBACK"):
            raise
        print(f"wngen {name}: error: {error}", file=sys.stderr)
        print("With WNGEN_TRACEBACK=1 in the environment it says where.", file=sys.stderr)
        return 1
    return 0


def _quieten() -> None:
    """Leave out what Lightning says about itself, and torch to Lightning, so that one sees what wngen says."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        "Checkpoint directory .* exists",
        "`isinstance\\(treespec, LeafSpec\\)`",
        "The number of training batches",
        "It is recommended to use .*sync_dist=True",  # what is logged is the same in every process already
    ):
        warnings.filterwarnings("ignore", message)
