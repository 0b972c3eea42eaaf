"""``python -m rewardops``: ``verify`` checks every op on this machine, ``config`` says what serves them."""

from __future__ import annotations

import argparse
import sys

from .core.dispatch import show_config


def main() -> int:
    parser = argparse.ArgumentParser(prog="rewardops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("verify", help="hold every op on every backend to float64", add_help=False)
    commands.add_parser("config", help="what is installed, and what serves each device")
    args, rest = parser.parse_known_args()
    if args.command == "config":
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        show_config()
        return 0
    from .testing import verify

    return verify.main(rest)


if __name__ == "__main__":
    sys.exit(main())
