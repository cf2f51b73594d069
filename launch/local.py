"""Processes on this machine: environments, supervision, signals and logs."""

import contextlib
import ctypes
import dataclasses
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

POLL = 0.05
"""Seconds between checks of the processes."""
DEAD_GRACE = 5.0
"""Seconds until the others are killed after one has died: without it they cannot save."""
TAIL = 15
"""Number of lines printed of a dead process's log."""
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit statuses of a process that has saved and stopped after a signal."""


@dataclasses.dataclass(frozen=True)
class Process:
    """One process to start.

    Attributes:
      command: program and arguments.
      environment: variables added to the environment.
      log: file for its output; None for the terminal.
    """

    command: list[str]
    environment: dict[str, str]
    log: Path | None


def plan(command: Sequence[str], count: int, logs: Path) -> list[Process]:
    """Returns the processes of a run on this machine.

    They connect over a free port. GPUs and CPU cores are divided among them. Raises ValueError if
    the number of GPUs is not a multiple of the number of processes.
    """
    if count == 1:
        return [Process(list(command), {}, None)]
    address = f"127.0.0.1:{free_port()}"
    shared = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
    }
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        each = 2 ** int(math.log2(min(8, max(1, cores() // count))))
        shared["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={each}".strip()
    parts = shares(gpus(), count)
    return [
        Process(
            list(command),
            shared
            | {"JAX_PROCESS_ID": str(i)}
            | ({"CUDA_VISIBLE_DEVICES": ",".join(parts[i])} if parts else {}),
            logs / f"process_{i}.log" if i else None,
        )
        for i in range(count)
    ]


def free_port() -> int:
    """Returns a free TCP port."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def cores() -> int:
    """Returns the number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """Returns the NVIDIA GPUs that JAX would use, named as in CUDA_VISIBLE_DEVICES."""
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def shares(devices: Sequence[str], count: int) -> list[list[str]]:
    """Divides `devices` among `count` processes; returns an empty list without devices.

    Raises ValueError if they do not divide evenly.
    """
    if len(devices) % count:
        raise ValueError(
            f"--processes {count}: {len(devices)} GPUs do not divide among them; one process can "
            "use them all, JAX_PLATFORMS=cpu uses none"
        )
    each = len(devices) // count
    return [list(devices[i * each : (i + 1) * each]) for i in range(count)] if each else []


def describe(processes: Sequence[Process]) -> str:
    """Returns the processes as shell commands, one per line."""
    lines = []
    for one in processes:
        variables = " ".join(f"{name}={shlex.quote(v)}" for name, v in one.environment.items())
        to = f" >> {shlex.quote(str(one.log))} 2>&1" if one.log else ""
        lines.append(f"{variables} {shlex.join(one.command)}{to} &".lstrip())
    return "\n".join([*lines, "wait"]) if len(lines) > 1 else lines[0].removesuffix(" &")


def run(processes: Sequence[Process], grace: float) -> int:
    """Runs the processes until all have ended; returns the first failure's exit status, or 0.

    SIGTERM and SIGINT are forwarded to all processes, which have `grace` seconds to save; a second
    signal kills them. If one dies, the others get SIGTERM and are killed `DEAD_GRACE` seconds
    later.
    """
    with contextlib.ExitStack() as stack:
        received = stack.enter_context(signals())
        outs, begins = [], []
        for one in processes:
            outs.append(stack.enter_context(_log(one)) if one.log else None)
            begins.append(outs[-1].tell() if one.log else 0)
        started = [_start(one, out) for one, out in zip(processes, outs, strict=True)]
        if len(started) > 1:
            say(f"{len(started)} processes, {' '.join(str(one.pid) for one in started)}; "
                f"the first prints here, the others to {processes[1].log.parent}")  # fmt: skip
        first = _supervise(started, received, grace)
        if first is not None:
            _report(first, started, processes[first], begins[first], received)
        return _status(started[first].returncode) if first is not None else 0


def _log(one: Process) -> BinaryIO:
    """Opens a process's log for appending, and writes a line with the command."""
    one.log.parent.mkdir(parents=True, exist_ok=True)
    out = one.log.open("ab")
    out.write(f"--- {shlex.join(one.command)}\n".encode())
    out.flush()
    return out


def _start(one: Process, out: BinaryIO | None) -> subprocess.Popen:
    return subprocess.Popen(
        one.command,
        env=os.environ | one.environment | ({"PYTHONUNBUFFERED": "1"} if out else {}),
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT if out else None,
        # Own session: Ctrl-C reaches only the launcher, which forwards it once; twice would kill.
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )


def _die_with_parent() -> None:
    """Makes Linux send SIGTERM to the process when the launcher dies, to release the workdir."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _supervise(
    started: Sequence[subprocess.Popen], received: list[int], grace: float
) -> int | None:
    """Waits for all processes; returns which failed first."""
    first, handled, deadline = None, 0, math.inf
    while alive := [one for one in started if one.poll() is None]:
        if len(received) > handled:  # the first signal is forwarded, the second kills
            number = signal.SIGKILL if handled else received[0]
            say(
                f"{_name(number)} to all"
                + ("" if handled else "; they save and stop; a second signal kills them")
            )
            _send(alive, number)
            handled, deadline = len(received), min(deadline, time.monotonic() + grace)
        if first is None:
            first = _failed(started)
            if first is not None and not handled:
                # A process that stopped on a signal has notified the others; all save together.
                stopped = started[first].returncode in STOPPED
                if not stopped:
                    _send(alive, signal.SIGTERM)
                deadline = time.monotonic() + (grace if stopped else DEAD_GRACE)
        if time.monotonic() > deadline:
            _send(alive, signal.SIGKILL)
        time.sleep(POLL)
    return _failed(started) if first is None else first


def _failed(started: Sequence[subprocess.Popen]) -> int | None:
    return next((i for i, one in enumerate(started) if one.returncode), None)


def _send(alive: Sequence[subprocess.Popen], number: int) -> None:
    for one in alive:
        with contextlib.suppress(ProcessLookupError):
            one.send_signal(number)


def _report(
    first: int,
    started: Sequence[subprocess.Popen],
    process: Process,
    begin: int,
    received: Sequence[int],
) -> None:
    """Reports which process ended first, how, the end of its log, and what to do."""
    code, again = started[first].returncode, "run the same command again to go on"
    if received or code in STOPPED:
        killed = [i for i, one in enumerate(started) if one.returncode == -signal.SIGKILL]
        if killed:
            say(f"stopped; process {', '.join(map(str, killed))} had to be killed and may not have "
                f"saved since the last checkpoint; {again} from there")  # fmt: skip
        else:
            say(f"stopped by {_name(received[0] if received else code - 128)}; {again}")
        return
    how = f"was killed by {_name(-code)}" if code < 0 else f"ended with exit status {code}"
    others = "" if len(started) == 1 else " and the others were ended"
    what = "" if code == 2 else f"; {again} from the last checkpoint"
    say(f"process {first} {how}{others}{what}")
    if process.log:
        with process.log.open("rb") as file:
            file.seek(begin)
            lines = file.read().decode(errors="replace").splitlines()[-TAIL:]
        say(f"{process.log} ends:\n" + "\n".join(f"  {line}" for line in lines))


def run_with_stop(start: Sequence[str], stop: Sequence[str]) -> int:
    """Runs `start` until it ends; on SIGTERM or Ctrl-C runs `stop`, which makes `start` end."""
    with signals() as received:
        process, handled = subprocess.Popen(start, start_new_session=True), 0
        while process.poll() is None:
            if len(received) > handled:
                if handled:
                    process.kill()
                else:
                    subprocess.run(stop, check=False)
                handled = len(received)
            time.sleep(POLL)
        return 128 + received[0] if received else _status(process.returncode)


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT in a list instead of their default effect."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before: Mapping[int, object] = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in numbers
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """Prints a line of the launcher on stderr."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def _status(code: int) -> int:
    return 128 - code if code < 0 else code


def _name(number: int) -> str:
    return signal.Signals(number).name
