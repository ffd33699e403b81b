"""The version, in a module that imports nothing: every result file names it."""

__version__ = "0.1.0"
