"""Program that runs code and its tests in a sandbox; `run_code` starts it as a script. Imports the standard library
only.

The outer process enters the namespaces, forks and kills the inner one when its time is up. The inner process gives up
its rights, runs the code and then the tests. Only afterwards it reads the token and writes it as the proof that all
tests have run: an exit, at any point before, proves nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from pathlib import Path
from typing import Any

STANDS = b"S"  # first byte of the result; any other text is the reason why the sandbox does not stand
SCRATCH = "size=32m,nr_inodes=1024,mode=700"  # of the only folder that can be written
# linux/sched.h: new user, mount, network, process and IPC namespaces
NAMESPACES = 0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000
MOUNT_SETATTR, HERE, RECURSIVE, READ_ONLY, PRIVATE = 442, -100, 0x8000, 0x1, 1 << 18
SET_PARENT_DEATH_SIGNAL, SET_SECCOMP, SET_NO_NEW_PRIVILEGES, FILTER = 1, 22, 38, 2
CAPABILITY_VERSION = 0x20080522
# by machine: AUDIT_ARCH of linux/audit.h; system calls that are denied; clone; clone3
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, (57, 58, 41, 272, 425), 56, 435),  # fork, vfork, socket, unshare, io_uring_setup
    "aarch64": (0xC00000B7, (198, 97, 425), 220, 435),  # socket, unshare, io_uring_setup
}
MOST_PROCESSES, MOST_FILES = 64, 128


def enter_namespaces(libc: ctypes.CDLL) -> None:
    """Leave the network, the other processes and the right to write files. Raises OSError where the kernel refuses."""
    user, group, folder = os.getuid(), os.getgid(), Path.cwd()
    if platform.machine() not in SYSTEM_CALLS:
        raise OSError(f"system calls of {platform.machine()} are not known")
    _check(libc.unshare(NAMESPACES), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text)
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, PRIVATE, 0)
    _check(libc.syscall(MOUNT_SETATTR, HERE, b"/", RECURSIVE, attributes, ctypes.sizeof(attributes)), "mount_setattr")
    _check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, SCRATCH.encode()), "mount")
    os.chdir(folder)


def give_up_rights(libc: ctypes.CDLL, limits: dict[str, int]) -> None:
    """Limit the resources, capabilities and system calls of this process for good. Raises OSError."""
    _check(libc.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # linear algebra libraries start a thread for each core
    for name, most in {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NPROC: MOST_PROCESSES,
        resource.RLIMIT_NOFILE: MOST_FILES,
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(name, (most, most))
    _check(libc.capset(struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24)), "capset")
    deny_system_calls(libc)


def deny_system_calls(libc: ctypes.CDLL) -> None:
    """Deny new processes, sockets and namespaces to this process for good. Raises OSError where the kernel refuses."""
    _check(libc.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    code = ctypes.create_string_buffer(system_call_filter(platform.machine()))
    program = struct.pack("HP", (len(code) - 1) // 8, ctypes.addressof(code))
    _check(libc.prctl(SET_SECCOMP, FILTER, program, 0, 0), "seccomp")


def system_call_filter(machine: str) -> bytes:
    """Return the BPF program that denies new processes, sockets and namespaces, and allows threads.

    The limit on processes alone does not hold for root.
    """
    architecture, denied, clone, clone3 = SYSTEM_CALLS[machine]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, absent, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # EPERM; ENOSYS
    thread, foreign = 0x00010000, 0x40000000  # CLONE_THREAD; numbers of the x32 system calls
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, foreign), (answer, 0, 0, kill)]
    for number in denied:
        lines += [(equal, 0, 1, number), (answer, 0, 0, deny)]
    lines += [(equal, 0, 1, clone3), (answer, 0, 0, absent)]  # its flags are not visible: libraries fall back to clone
    lines += [(equal, 1, 0, clone), (answer, 0, 0, allow), (load, 0, 0, 16), (any_bit, 1, 0, thread)]
    lines += [(answer, 0, 0, deny), (answer, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def run_parts(parts: list[str]) -> None:
    """Run the parts of a program one after the other as one module, which is not the main one."""
    module = types.ModuleType("answer")
    sys.modules["answer"] = module  # dataclasses look up the module of a class
    for part in parts:
        exec(compile(part, "answer", "exec", dont_inherit=True), module.__dict__)


def _inner(libc: ctypes.CDLL, request: dict[str, Any], result: int, token: int) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    os.environ.clear()
    try:
        give_up_rights(libc, request["limits"])
    except OSError as error:
        os.write(result, str(error).encode())
        return
    os.write(result, STANDS)
    run_parts(request["parts"])
    os.write(result, os.read(token, 64))


def main(result: int, token: int) -> None:
    """Run the request on standard input; write the result to one pipe after reading the token from another."""
    request = json.loads(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        enter_namespaces(libc)
    except (OSError, AttributeError) as error:  # AttributeError: a libc without the function
        os.write(result, str(error).encode())
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        try:
            _inner(libc, request, result, token)
        finally:
            os._exit(0)
    signal.sigtimedwait({signal.SIGCHLD}, request["limits"]["wall_seconds"])
    os.kill(child, signal.SIGKILL)  # the first process of its namespace: the kernel kills all others
    os.waitpid(child, 0)


def _check(status: int, name: str) -> None:
    if status < 0:
        raise OSError(f"{name}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
