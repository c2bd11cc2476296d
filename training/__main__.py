"""`python -m training` is the command `hashengine train`."""

from hashengine.cli.train import app

app(prog_name="python -m training")
