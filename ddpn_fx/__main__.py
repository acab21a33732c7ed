"""``python -m ddpn_fx``: the command line."""

import sys

from ddpn_fx.cli import main

if __name__ == "__main__":
    sys.exit(main())
