"""A process that has no descriptor free: it can look at nothing."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def blind() -> Iterator[None]:
    """Whatever is opened meanwhile fails with EMFILE; what is open stays so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
