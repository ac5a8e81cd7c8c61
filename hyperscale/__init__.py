"""One frozen large model, many tasks at once."""

__version__ = "0.1.0"
