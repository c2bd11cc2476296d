"""`python -m training` is the command `hashengine train`."""

from hashengine._interrupt import run


def start() -> None:
    """Run the command line."""
    from hashengine.cli.train import app

    app(prog_name="python -m training")


run(start)
