"""The command `hashengine`, which is also `python -m hashengine`."""

from hashengine._interrupt import run


def main() -> None:
    """Run the command line. Its imports are here, so that Ctrl-C during them ends the command like any other."""

    def start() -> None:
        from hashengine.cli import app

        app(prog_name="hashengine")

    run(start)


if __name__ == "__main__":
    main()
