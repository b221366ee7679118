"""The swap agent: the pager of the GPU."""

__version__ = "0.1.0"
