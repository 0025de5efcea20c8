"""Errors: one base, each also the builtin that a caller expects; messages say where, what, what was expected, and the
way out.
"""

import pytest

import revwire
from revwire import _errors

ERRORS = [e for e in vars(_errors).values() if isinstance(e, type) and issubclass(e, revwire.RevwireError)]


@pytest.mark.parametrize("error", [e for e in ERRORS if e is not revwire.RevwireError])
def test_each_error_is_ours_and_a_builtin(error):
    builtin = [b for b in error.__mro__ if b.__module__ == "builtins" and b not in (Exception, BaseException, object)]
    assert builtin
    assert issubclass(error, revwire.RevwireError)


@pytest.mark.parametrize("error", ERRORS)
def test_each_error_is_public_and_documented(error):
    assert getattr(revwire, error.__name__) is error
    assert error.__doc__
