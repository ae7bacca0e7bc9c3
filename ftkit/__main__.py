"""`ftkit`, and `python -m ftkit`: the command line, which is imported where Ctrl-C is waited for."""

import sys

from ftkit.core import exit_codes


def main() -> None:
    """Run the command of `sys.argv`; does not return."""
    try:
        from ftkit.launch.cli import main as command
    except KeyboardInterrupt:
        print("ftkit: interrupted", file=sys.stderr)
        sys.exit(exit_codes.INTERRUPTED)
    command()


if __name__ == "__main__":
    main()
