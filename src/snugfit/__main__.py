"""`python -m snugfit`: the command line."""

from snugfit.cli.app import app

app(prog_name="snugfit")
