"""The command `hashengine`, which is also `python -m hashengine`."""

import sys

from hashengine._interrupt import run


def main() -> None:
    """Run the command line. Its imports are here, so that Ctrl-C during them ends the command like any other."""

    def start() -> None:
        from hashengine.cli import app, flush_stdout

        try:
            app(prog_name="hashengine")
        except SystemExit as end:
            sys.exit(flush_stdout(end.code))

    run(start)


if __name__ == "__main__":
    main()
