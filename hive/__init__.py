"""hive: a GPU inference worker daemon that owns its engines completely."""

__version__ = "0.1.0"
