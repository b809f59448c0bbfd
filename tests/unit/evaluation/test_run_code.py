"""Code of answers: how it is found in a text, and the sandbox that runs it with tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from firp_cli.data.references import Reference
from firp_cli.errors import SandboxError
from firp_cli.evaluation import accuracy, run_code
from firp_cli.evaluation.accuracy import judge_answers
from firp_cli.evaluation.bench_prompts import BenchPrompt
from firp_cli.evaluation.run_code import Limits, extract_code, passes_tests, run_parts, sandbox_fault
from firp_cli.records import AnswerRecord

HEAD = 'import math\n\n\ndef root(number: int) -> int:\n    """Return the whole root of a number."""\n'
TASK = Reference(
    tests="def check(candidate):\n    assert candidate(16) == 4\n    assert candidate(17) == 4\n\ncheck(root)\n",
    entry_point="root",
    head=HEAD,
)
RIGHT = "def root(number):\n    return math.isqrt(number)\n"
EXITS = ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "quit()", "print('passed')"]


@pytest.fixture(scope="module")
def sandbox() -> None:
    if fault := sandbox_fault():
        pytest.skip(fault)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (f"Here it is:\n```python\n{RIGHT}```\nIt uses the library.", True),
        (f"```\n{RIGHT}```", True),
        (f"Like this: ```py\n{RIGHT.rstrip()}```, which is short.", True),
        ("1. Like this:\n   ```python\n   def root(number):\n       return math.isqrt(number)\n   ```\n", True),
        (f"First try:\n```python\n{HEAD}    return number\n```\nBetter:\n```python\n{RIGHT}```", True),
        (f"```python\n{RIGHT}```\nUse it so:\n```python\nprint(root(16))\n```", True),
        (f"```python\n{RIGHT}\nprint(root(1", True),
        (RIGHT, True),
        (f"Sure, I can do that.\n\n{RIGHT}\nThat is all.", True),
        ("    return math.isqrt(number)\n\n\ndef other():\n    return 1\n", True),
        ("return math.isqrt(number)\n", True),
        ("    return math.isqrt(number)\n```\nIt uses the library.", True),
        ("```python\n    return math.isqrt(number)\n```", True),
        ("```python\ndef root(number):\n    return number ** 0.5\n```", False),
        ("```python\ndef square_root(number):\n    return math.isqrt(number)\n```", False),
        (f"```python\n{HEAD}```", False),
        ("The root is found by trying.", False),
        ("", False),
        (f"<think>\n```python\n{RIGHT}```\nNo.", False),
    ],
)
def test_code_of_an_answer_is_found_and_judged(sandbox: None, text: str, right: bool) -> None:
    assert passes_tests(TASK, accuracy.spoken(text)) is right


def test_last_block_that_defines_the_function_is_taken() -> None:
    blocks = ["def root(x): return 1", "def root(x): return 2", "root(3)"]
    text = "\n".join(f"```python\n{block}\n```" for block in blocks)
    assert (extract_code(TASK, text) or "").strip() == blocks[1]
    assert extract_code(Reference(tests="assert True"), "```\nx = 1\n```") == "x = 1\n"


@pytest.mark.parametrize("code", EXITS)
def test_early_exit_is_no_success(sandbox: None, code: str) -> None:
    assert run_parts([code, "assert False"]) is False
    body = f"def root(number):\n    {code}\n"
    assert run_parts([body, "assert root(16) == 4"]) is False


def test_endless_code_is_stopped(sandbox: None) -> None:
    for code, limits in (
        ("while True: pass", Limits(cpu_seconds=1)),
        ("import time; time.sleep(99)", Limits(wall_seconds=3)),
    ):
        began = time.monotonic()
        assert run_parts([code], limits) is False
        assert time.monotonic() - began < 25


def test_memory_and_files_are_limited(sandbox: None) -> None:
    limits = Limits(memory_bytes=1 << 28, file_bytes=1 << 20)
    bomb = "held = []\ntry:\n    while True: held.append(bytearray(1 << 24))\nexcept MemoryError: pass\n"
    assert run_parts([f"{bomb}assert 4 < len(held) < 16"], limits) is True
    assert run_parts(["held = bytearray(1 << 30)"], limits) is False
    assert run_parts(["open('large', 'wb').write(bytes(1 << 19))"], limits) is True
    assert run_parts(["open('large', 'wb').write(bytes(1 << 21))"], limits) is False


def test_processes_are_denied_and_threads_allowed(sandbox: None) -> None:
    denied = "try:\n    {}\nexcept PermissionError: pass\nelse: raise AssertionError"
    assert run_parts(["import os\nwhile True: os.fork()"]) is False
    assert run_parts(["import os, subprocess, sys", denied.format("os.fork()")]) is True
    assert run_parts(["import subprocess, sys", denied.format("subprocess.run([sys.executable, '-V'])")]) is True
    threads = "import threading\nran = []\nt = threading.Thread(target=ran.append, args=(1,))\nt.start()\nt.join()\n"
    assert run_parts([threads, "assert ran == [1]"]) is True
    assert (
        run_parts(["import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()"])
        is False
    )


def test_other_processes_cannot_be_signalled(sandbox: None) -> None:
    code = f"import os\ntry: os.kill({os.getpid()}, 0)\nexcept ProcessLookupError: hidden = True"
    assert run_parts([code, "assert hidden and os.getpid() == 1"]) is True


@pytest.fixture
def server() -> Iterator[tuple[str, socket.socket]]:
    """Return code that connects to a server on this machine, and the server."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)
        yield f"import socket\nsocket.create_connection({listening.getsockname()}, 2)", listening


def test_network_is_out_of_reach(sandbox: None, server: tuple[str, socket.socket]) -> None:
    code, listening = server
    exec(code, {})
    listening.accept()[0].close()
    assert run_parts([code]) is False
    listening.settimeout(0.2)
    with pytest.raises(TimeoutError):
        listening.accept()


def test_network_namespace_alone_has_no_network(
    sandbox: None, server: tuple[str, socket.socket], tmp_path: Path
) -> None:
    """Sockets are denied as well; here they are not."""
    script = (
        f"import ctypes, runpy\nspace = runpy.run_path({str(run_code.SANDBOX)!r})\n"
        f"space['enter_namespaces'](ctypes.CDLL(None, use_errno=True))\n{server[0]}"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode and "Network is unreachable" in done.stderr, done.stderr


def test_files_are_written_to_a_folder_that_vanishes(
    sandbox: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = tmp_path / "kept"
    kept.write_text("mine", encoding="utf-8")
    assert run_parts(["open('new', 'w').write('x')", "assert open('new').read() == 'x'"]) is True
    refused = "import os\ntry: {}\nexcept OSError: refused = True"
    for call in (f"open({str(kept)!r}, 'w')", f"os.remove({str(kept)!r})", f"open({str(tmp_path / 'new')!r}, 'w')"):
        assert run_parts([refused.format(call), "assert refused"]) is True, call
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and kept.read_text(encoding="utf-8") == "mine"


def test_read_only_files_cannot_be_made_writable(sandbox: None, tmp_path: Path) -> None:
    mount = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "again = libc.mount(b'', b'/', b'', 32 | 4096, None)\nmore = libc.unshare(0x10000000 | 0x20000)\n"
    )
    assert run_parts([mount, "assert (again, more) == (-1, -1)"]) is True


def test_code_has_no_environment_no_input_and_no_output(
    sandbox: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FIRP_SECRET", "value")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere")
    assert run_parts(["import os", "assert not os.environ"]) is True
    assert run_parts(["try: input()\nexcept EOFError: empty = True", "assert empty"]) is True
    assert run_parts(["import sys\nprint('x' * 10 ** 6)\nprint('y', file=sys.stderr)"]) is True
    assert capfd.readouterr() == ("", "")


def test_classes_of_the_code_find_their_module(sandbox: None) -> None:
    code = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int\n"
    )
    assert (
        run_parts(["import math", f"{code}if __name__ == '__main__': raise SystemExit", "assert Point(1).x == 1"])
        is True
    )


def test_nothing_is_run_where_the_kernel_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself refuses: a process that denied namespaces to itself starts the sandbox."""
    denying = tmp_path / "denying.py"
    denying.write_text(
        f"import ctypes, runpy, sys\nspace = runpy.run_path({str(run_code.SANDBOX)!r})\n"
        "space['deny_system_calls'](ctypes.CDLL(None, use_errno=True))\n"
        "space['main'](int(sys.argv[1]), int(sys.argv[2]))\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(run_code, "SANDBOX", denying)
    reason = "the sandbox cannot stand here (unshare: Operation not permitted)"
    with pytest.raises(SandboxError) as caught:
        run_parts([f"open({str(tmp_path / 'ran')!r}, 'w')"])
    assert str(caught.value) == reason and not (tmp_path / "ran").exists()
    records = [answer("ar", f"```python\n{RIGHT}```")]
    assert judge_answers(records, PROMPTS, run_code=True) == [f"--run-code: no answer was run: {reason}"]
    assert records[0].correct is None


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert sandbox_fault() == "the sandbox is made of Linux namespaces, this is darwin"


PROMPTS = [BenchPrompt([1], "humaneval", reference=TASK)]


def answer(method: str, text: str) -> AnswerRecord:
    return AnswerRecord(method, "humaneval", "", 0, 0, 0, 0, 0, 4, 9, 8, [1] * 8, 0.1, 0.2, "eos", text=text)


def test_equal_answers_are_run_once(sandbox: None, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def counted(reference: Reference, text: str) -> bool:
        runs.append(text)
        return passes_tests(reference, text)

    monkeypatch.setattr(accuracy, "passes_tests", counted)
    records = [answer("ar", RIGHT), answer("firp", RIGHT), answer("hf", RIGHT.replace("isqrt", "floor"))]
    ticks: list[tuple[int, int | None]] = []
    assert judge_answers(records, PROMPTS, True, lambda done, total: ticks.append((done, total))) == []
    assert [item.correct for item in records] == [True, True, False]
    assert len(runs) == 2 and ticks == [(0, 2), (1, 2), (2, 2)]


def test_interruption_keeps_the_verdicts_that_are_made(sandbox: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(reference: Reference, text: str) -> bool:
        if "floor" in text:
            raise KeyboardInterrupt
        return passes_tests(reference, text)

    monkeypatch.setattr(accuracy, "passes_tests", interrupted)
    records = [answer("ar", RIGHT), answer("hf", RIGHT.replace("isqrt", "floor"))]
    assert judge_answers(records, PROMPTS, run_code=True) == ["--run-code: interrupted after 1 of 2 answers"]
    assert [item.correct for item in records] == [True, None]
