"""Judgement of answers that are code, by running the data set's tests on it in a sandbox (`code_sandbox.py`).

The code runs in a fresh interpreter without environment variables, in Linux namespaces of its own: without network,
and without the processes of the machine. All files are read-only to it but a new folder in memory, which vanishes with
it. CPU time, memory, file sizes and wall time are limited; it can start threads but no processes and no sockets. What
it prints is discarded. Where the kernel refuses one of these, nothing is run.

It is no protection against code that is written to attack it: the code can read the files that the user can read
(though it cannot send them anywhere), it shares the kernel, and as it runs in one interpreter with the tests it can
tamper with them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from firp_cli.data.references import Reference, parse_code
from firp_cli.errors import SandboxError
from firp_cli.evaluation.code_sandbox import STANDS

SANDBOX = Path(__file__).with_name("code_sandbox.py")
START_SECONDS = 20  # of the interpreter, on a busy machine
LONGEST_RESULT = 4096  # bytes
BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
LIBRARIES = "LD_LIBRARY_PATH"  # without which some interpreters cannot start; the sandbox clears it
STATEMENT = re.compile(r"^(?:def|class|import|from|async def|@)\b", re.MULTILINE)


@dataclass(frozen=True)
class Limits:
    """Limits of one run of code and tests."""

    cpu_seconds: int = 10
    wall_seconds: int = 30
    memory_bytes: int = 1 << 30  # address space
    file_bytes: int = 1 << 24


def passes_tests(reference: Reference, text: str, limits: Limits = Limits()) -> bool:
    """Return True if the code of an answer passes the reference's tests. Raises SandboxError."""
    code = extract_code(reference, text)
    return code is not None and run_parts([reference.head, code, reference.tests], limits)


def extract_code(reference: Reference, text: str) -> str | None:
    """Return the code of an answer that defines the entry point: of its last block of code, else of its text, else of
    the reference's head with the answer as its continuation. None for an answer without one.
    """
    for candidate in _candidates(reference.head, text):
        code = _python(candidate)
        if code.strip() not in ("", reference.head.strip()) and (
            not reference.entry_point or reference.entry_point in _defined(code)
        ):
            return code
    return None


def sandbox_fault() -> str | None:
    """Return the reason why code cannot be run on this machine; None where it can."""
    try:
        return None if run_parts(["proof = 1", "assert proof == 1"]) else "the sandbox does not run correct code"
    except SandboxError as error:
        return str(error)


def run_parts(parts: Sequence[str], limits: Limits = Limits()) -> bool:
    """Run the parts of a program in order in a sandbox; return True if the last one has ended without an exception.

    Raises SandboxError where the sandbox cannot stand; nothing was run then.
    """
    if sys.platform != "linux":
        raise SandboxError(f"the sandbox is made of Linux namespaces, this is {sys.platform}")
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory(prefix="firp-code-") as folder:
        result = _run(json.dumps({"parts": list(parts), "limits": asdict(limits)}).encode(), token, folder, limits)
    if not result.startswith(STANDS):
        reason = result.decode(errors="replace") or "it ended before the code could start"
        raise SandboxError(f"the sandbox cannot stand here ({reason})")
    return result == STANDS + token


def _run(request: bytes, token: bytes, folder: str, limits: Limits) -> bytes:
    """Return the bytes that the sandbox and the code in it wrote to the result pipe."""
    ends = zip((*os.pipe(), *os.pipe()), ("rb", "wb", "rb", "wb"), strict=True)
    with ExitStack() as stack:
        result, result_end, token_end, token_source = (
            stack.enter_context(os.fdopen(end, mode, buffering=0)) for end, mode in ends
        )
        token_source.write(token)
        passed = (result_end.fileno(), token_end.fileno())
        with subprocess.Popen(
            [sys.executable, "-I", str(SANDBOX), *map(str, passed)],
            cwd=folder,
            env={LIBRARIES: os.environ[LIBRARIES]} if LIBRARIES in os.environ else {},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=passed,
            start_new_session=True,
        ) as process:
            try:
                process.communicate(request, timeout=limits.wall_seconds + START_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        os.set_blocking(result.fileno(), False)
        return result.read(LONGEST_RESULT) or b""


def _candidates(head: str, text: str) -> Iterator[str]:
    """Yield texts that may be the answer's program, the likeliest first."""
    blocks = [textwrap.dedent(block) if block[:1] in " \t" else block for block in BLOCK.findall(text)]
    yield from reversed(blocks)
    if start := STATEMENT.search(text):
        yield text[start.start() :]
    if head:
        for body in (*reversed(BLOCK.findall(text)), text):
            yield f"{head}{'' if body[:1].isspace() else '    '}{_indented_part(body)}"


def _indented_part(text: str) -> str:
    """Return the lines before the second one that begins at the margin: a function's body may lack its first indent."""
    lines = text.split("\n")
    end = next((place for place, line in enumerate(lines) if place and line[:1].strip()), len(lines))
    return "\n".join(lines[:end])


def _python(text: str) -> str:
    """Return the longest beginning of a text, in lines, that is Python."""
    lines = text.split("\n")
    while lines and parse_code("\n".join(lines)) is None:
        lines.pop()
    return "\n".join(lines)


def _defined(code: str) -> set[str]:
    """Return the names that code defines at the top level."""
    parsed = parse_code(code)
    assert parsed is not None
    named = {item.name for item in parsed.body if hasattr(item, "name")}
    targets = (target for item in parsed.body for target in getattr(item, "targets", ()))
    return named | {target.id for target in targets if hasattr(target, "id")}
