"""Says which of pyproject.toml's extras has a library that is not installed.

with extra("serve"):
    import uvicorn
"""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ModuleNotFoundError):
    """A library of an extra is not installed; the message says how to install it."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports that need the extra `name`.

    Raises:
        MissingExtra: one of them is not installed.
    """
    try:
        yield
    except MissingExtra:
        raise  # a module that is imported here has named its own
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{error.name} is not installed; in this repository's folder, pip install -e '.[{name}]'", name=error.name
        ) from None
