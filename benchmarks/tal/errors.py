"""What a user gave that cannot be used. At the command line each of these is one line and exit code 2."""

from __future__ import annotations


class InputError(Exception):
    """Says where, what was found, and what was expected."""


class EmptyError(InputError, ValueError):
    """There is nothing to work on: no video in a subset, no clip in a folder."""


class MissingError(InputError, FileNotFoundError):
    """A folder or a file that is not there."""
