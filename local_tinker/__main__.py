"""`local-tinker` and `python -m local_tinker`: imports nothing before Ctrl-C is answered."""

import sys


def main() -> int:
    """Run the command line; the exit code."""
    try:
        from .cli.app import main as command

        return command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
