"""What all command lines have in common: how they read options, and how they end.

parser = Parser(prog="python -m tools.plan")

@one_line_errors
def main(argv=None) -> int: ...

if __name__ == "__main__":
    run_command(main)
"""

import argparse
import difflib
import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

WRONG_USE = 2
INTERRUPTED = 130  # exit codes as shells give them: 128 + the signal's number
READER_GONE = 141


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """ "; did you mean X?" or nothing. A name from YAML may be a number."""
    found = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


class Parser(argparse.ArgumentParser):
    """Proposes the nearest option for one that it does not know."""

    def unknown(self, argument: str) -> str:
        """What to say of an argument that no option takes."""
        return f"unknown argument {argument!r}{did_you_mean(argument.partition('=')[0], self._option_string_actions)}"

    def parse_args(self, args=None, namespace=None):
        """As argparse, but a misspelt option is named before the ones that are missing: it may be one of them."""
        given = sys.argv[1:] if args is None else list(args)
        options = given[: given.index("--")] if "--" in given else given
        for argument in options:
            name = argument.partition("=")[0]
            # argparse takes what has a blank for a value
            if name.startswith("--") and " " not in argument and not self._is_known(name):
                self.error(self.unknown(argument))
        return super().parse_args(given, namespace)

    def _is_known(self, name: str) -> bool:
        known = self._option_string_actions
        return name in known or (self.allow_abbrev and any(option.startswith(name) for option in known))


def one_line_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Decorator of `main`: what its user can mend becomes one line on standard error and exit code 2.

    That is a ValueError or OSError, an ImportError (a library is missing) or a FloatingPointError (a loss is not finite).
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except BrokenPipeError:  # an OSError, which `run_command` ends without a word
            raise
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            return WRONG_USE

    return run


def run_command(main: Callable[[], int]) -> NoReturn:
    """End the process with the exit code of `main`. Ctrl-C and a closed output pipe end it without a traceback."""
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        # What is still buffered goes nowhere, else the interpreter complains about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = READER_GONE
    sys.exit(code)


def check_early(name: str, check: Callable[[], object]) -> None:
    """Answer --help and wrong options of a command before what follows is imported, since torch takes seconds.

    Args:
        name: `__name__` of the module; where it is not run as a command, nothing happens.
        check: reads the command line; raises for what it does not understand.
    """
    if name != "__main__":
        return
    try:
        check()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_USE)


def no_command(instead: str) -> NoReturn:
    """For `python -m` of a module that is no command: name the command that is meant, instead of doing nothing."""
    print(f"error: this module is no command; {instead}", file=sys.stderr)
    sys.exit(WRONG_USE)
