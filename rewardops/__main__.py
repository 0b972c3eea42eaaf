"""``python -m rewardops``: ``verify`` checks every op on this machine, ``config`` lists their backends."""

from __future__ import annotations

import argparse
import sys

from .core.dispatch import show_config


def main() -> int:
    parser = argparse.ArgumentParser(prog="rewardops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("verify", help="compare every op on every backend with float64", add_help=False)
    commands.add_parser("config", help="list the installed backends, and those that serve each device")
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
