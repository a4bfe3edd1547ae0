"""``python -m loopos`` and the command ``loopos``."""

import sys


def main() -> None:
    """Run the command line, and exit with its code."""
    try:
        # Here, as importing takes a while in which people press Ctrl-C.
        from loopos.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
