"""Cycles of Pallas kernels, which no estimate of the compiled program holds, from schedules.

The TPU compiler writes a kernel's final schedule if asked to: instruction bundles of which one
issues per cycle, and loops whose trip counts stand in their exit tests. Bundles times trips are the
cycles in which the core issues; waits for transfers from HBM come on top where the kernel's bytes
take longer than that.
"""

import atexit
import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

_EXIT = re.compile(r"%(\w+) = [^;%]*totalorder\s+%\S+,\s+(\d+)\s+/\* loop exit test \*/")
_STAGED = re.compile(r"iteration index, stage = \d")
_ONLY_MOVING = 2  # turns of a loop over a grid: the first brings data, the last takes it away
_BACK = re.compile(r"sbr\.rel \(!%(\w+)\)")
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s")
_CALL = re.compile(r'%([\w.\-]+) = [^\n]*?custom_call_target="tpu_custom_call"')
_BODY = re.compile(r'"body":"([^"]*)"')
_FILE = re.compile(r"\d+-(.*)-\d+-final_bundles\.txt$")


@contextlib.contextmanager
def dumped() -> Iterator[Path]:
    """A folder for the schedules of what is compiled within; call before libtpu is loaded."""
    with tempfile.TemporaryDirectory(prefix="tpu_schedules_") as folder:
        before = os.environ.get("LIBTPU_INIT_ARGS", "")
        # The last pass alone: all of them fill gigabytes and take longer than the compilation.
        flags = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=final_bundles"
        )
        os.environ["LIBTPU_INIT_ARGS"] = f"{before} {flags}".strip()
        try:
            yield Path(folder)
        finally:
            os.environ["LIBTPU_INIT_ARGS"] = before


@functools.cache
def keep_schedules() -> Path:
    """As `dumped`, for all that this process will compile."""
    kept = contextlib.ExitStack()
    folder = kept.enter_context(dumped())
    atexit.register(kept.close)
    return folder


def clear(folder: Path) -> None:
    """Forget the schedules so far, before another program is compiled."""
    for file in folder.iterdir():
        file.unlink()


def cycles(folder: Path, program: str) -> dict[str, int]:
    """Issue cycles of one call of each Pallas kernel, by its instruction in the program's text.

    program: `Compiled.as_text()` of the only program compiled since `dumped` or `clear`.
    """
    bodies = {}
    for name, text in calls(program):
        body = _BODY.search(text)
        bodies[name] = body.group(1) if body else name  # where the text does not show any
    found = {}
    for file in folder.iterdir():
        name = _FILE.match(file.name)
        if name and name.group(1) in bodies:
            found[name.group(1)] = issue_cycles(file.read_text(errors="replace"))
    # Of equal kernels the compiler schedules one.
    by_body = {bodies[name]: count for name, count in found.items()}
    return {name: by_body[body] for name, body in bodies.items() if body in by_body}


def calls(program: str) -> list[tuple[str, str]]:
    """(instruction, the program's text from there to the next call) of each Pallas kernel."""
    found = list(_CALL.finditer(program))
    ends = [call.start() for call in found[1:]] + [len(program)]
    return [
        (call.group(1), program[call.start() : end])
        for call, end in zip(found, ends[: len(found)], strict=True)
    ]


def issue_cycles(schedule: str) -> int:
    """Bundles times loop trips of one kernel's final schedule.

    A loop begins at its label and ends with the region from which the branch on its exit test
    goes back: instructions of its surroundings may stand in between, where a slot was free. The
    loop over the grid makes two turns more than that has steps, in which it moves data and passes
    over the kernel; those are not counted.
    """
    count, begun, extra = 0, [], 0
    tests: dict[str, int] = {}  # predicate of an exit test → trips
    ending: list[int] = []  # trips of a loop that went back
    loops = []  # first bundle, last bundle, trips
    for line in schedule.splitlines():
        if _BUNDLE.match(line):
            count += 1
            if "LB:" in line.partition("{")[0]:
                begun.append(count)
        tests |= {predicate: int(trips) for predicate, trips in _EXIT.findall(line)}
        extra = _ONLY_MOVING if _STAGED.search(line) else extra
        ending += [tests[predicate] for predicate in _BACK.findall(line) if predicate in tests]
        if ending and "End region" in line:  # after the slots that issue before the branch is taken
            # The loop over the grid may begin with the kernel, without a label.
            first = begun.pop() if begun else 1
            loops.append((first, count, ending.pop() - (0 if begun else extra)))
    weights = [1] * (count + 1)
    for first, last, trips in loops:
        for i in range(first, last + 1):
            weights[i] *= trips
    return sum(weights[1:])
