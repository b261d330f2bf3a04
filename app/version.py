"""The version of the service, stored with every audit."""

from importlib.metadata import version

VERSION = version("winnow")
