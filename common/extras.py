"""Says which of pyproject.toml's extras has a library that is not installed.

with extra("serve"):
    import uvicorn
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class MissingExtra(ModuleNotFoundError):
    """A library of an extra is not installed; the message says how to install it."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports that need the extra `name`. They take seconds: in a command, Ctrl-C in them is no traceback.

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
    except KeyboardInterrupt:
        program = getattr(sys.modules["__main__"], "__file__", None)
        if program is None or ROOT not in Path(program).resolve().parents:
            raise  # a library in somebody's own program
        print("\ninterrupted while loading", file=sys.stderr)
        raise SystemExit(130) from None
