"""The command line: ``ddpn_fx demo``, ``chain``, ``explain``, ``export``, ``diff``, ``passes`` and ``picture``.

Also ``python -m ddpn_fx``. Exit status: 0 done; 1 the model or the installation does not allow it; 2 bad usage; 130
interrupted. PyTorch is imported by the commands, not by these modules, so that ``--help`` and ``--version`` answer at
once: parser.py has the arguments, texts.py the help, commands.py the commands, model.py makes the user's model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ddpn_fx.cli.errors import INTERRUPTED, CommandError
from ddpn_fx.cli.parser import make_parser

__all__ = ["CommandError", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; bad usage raises SystemExit(2), as argparse does."""
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        options.run(options)
    except CommandError as error:
        if options.traceback:
            raise
        print(f"ddpn_fx {options.command}: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"ddpn_fx {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0
