"""Every scenario of the manual in features/."""

from pytest_bdd import scenarios

scenarios(".")
