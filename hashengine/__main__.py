"""`python -m hashengine` is the command `hashengine`."""

from hashengine.cli import app

app(prog_name="hashengine")
