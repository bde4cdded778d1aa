"""The package's version, in one place."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("cospadi")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0"
