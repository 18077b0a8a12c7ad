"""The version, in a file that setup.py can read before anything is installed."""

__version__ = "0.1.0"
