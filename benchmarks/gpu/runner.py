"""Runs checks one after another within a time, keeps what each found, and writes it as it comes.

    passed     it ran and what it asserts holds
    failed     it raised something; the traceback is kept
    not run    what it needs is not here, or the time was up; the reason is kept
    running    only in a file whose writer still runs, or has died

A check that failed has cost only itself. One that leaves the GPU unusable, or kills the process, costs a new process,
which goes on behind it: `supervise` starts them, and ends the last one when the time is up.
"""

import gc
import json
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

BROKEN = 3  # exit code of a process whose GPU answers no more
SHARES = {"smoke": 3, "speed": 5, "sparse": 3}  # of the time, for the parts


class NotRun(Exception):
    """What a check needs is not here; the message says what."""


@dataclass
class Check:
    """One thing to find out.

    Args:
        name: "group/case". Cases of a group make a table, so their results have the same keys.
        run: -> what it measured, JSON values by name; raises if something is wrong.
        seconds: it does not begin with less time left; about what it takes on a GPU.
    """

    name: str
    run: Callable[[], dict]
    seconds: float = 5.0


@dataclass
class Report:
    """Results in a file: read when made, written whole or not at all at each change."""

    path: Path
    head: dict = field(default_factory=dict)
    checks: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self):
        if self.path.exists():
            known = json.loads(self.path.read_text())
            self.checks = known.pop("checks")
            self.head = known | self.head

    def note(self, name: str, **record):
        """Puts what is known of the check `name` in the place of what was."""
        self.checks[name] = record
        self.write()

    def write(self):
        """Writes the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.head | {"checks": self.checks}, indent=1) + "\n")
        os.replace(part, self.path)

    def end_running(self, status: str, reason: str) -> bool:
        """What was running when its process ended gets this status -> whether there was any."""
        running = [name for name, record in self.checks.items() if record["status"] == "running"]
        for name in running:
            self.note(name, status=status, reason=reason)
        return bool(running)


def run_part(
    part: str,
    checks: Iterator[Check],
    report: Report,
    deadline: float,
    clock: Callable[[], float] = time.time,
    is_broken: Callable[[], bool] = lambda: False,
):
    """Runs those checks that the report does not know, as long as the clock is before the deadline.

    Raises:
        SystemExit: a check left the GPU broken; the code is `BROKEN`.
    """
    for check in _guarded(checks):
        name = f"{part}/{check.name}"
        if name in report.checks:
            continue
        left = deadline - clock()
        if left < check.seconds:
            report.note(name, status="not run", reason=f"the time was up: {max(left, 0):.0f} s left of its part")
            continue
        report.note(name, status="running")
        start = clock()
        try:
            record = {"status": "passed", "result": check.run()}
        except NotRun as reason:
            record = {"status": "not run", "reason": str(reason)}
        except Exception as error:
            record = {"status": "failed", "reason": _first_line(error), "traceback": traceback.format_exc()}
        record["seconds"] = round(clock() - start, 2)
        report.note(name, **record)
        print(f"{record['status']:8} {record['seconds']:6.1f} s  {name}  {_in_short(record)}", flush=True)
        gc.collect()
        if torch.cuda.is_initialized():
            if record["status"] == "failed" and is_broken():
                raise SystemExit(BROKEN)
            torch.cuda.empty_cache()


def _guarded(checks: Iterator[Check]) -> Iterator[Check]:
    """The checks; an error while the next is made becomes a check that fails with it, the last one."""
    try:
        yield from checks
    except Exception as caught:
        error = caught

        def fail():
            raise error

        yield Check("making of checks/all that follow", fail, seconds=0.0)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def _in_short(record: dict) -> str:
    return record.get("reason") or ", ".join(f"{key} {value}" for key, value in record["result"].items())


def gpu_is_broken() -> bool:
    """Whether the GPU answers no more in this process, as after an access to memory that is not there."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def deadlines(parts: Iterable[str], start: float, end: float) -> dict[str, float]:
    """When each part must be through. What a part leaves over, the later ones have."""
    parts, passed, times = list(parts), 0, {}
    total = sum(SHARES[part] for part in parts)
    for part in parts:
        passed += SHARES[part]
        times[part] = start + (end - start) * passed / total
    return times


def supervise(command: list[str], path: Path, end: float, clock: Callable[[], float] = time.time) -> None:
    """Runs a command that fills the report at `path`, again where it dies, until it is through or the clock at `end`."""
    while (left := end - clock()) > 0:
        try:
            code = subprocess.run(command, timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            break
        if code == 0:
            return
        if (
            not Report(path).end_running("failed", f"the process ended with code {code} while it ran")
            and code != BROKEN
        ):
            raise RuntimeError(f"The process ended with code {code} while no check ran; what it printed says why.")
    Report(path).end_running("not run", "the time was up while it ran")
