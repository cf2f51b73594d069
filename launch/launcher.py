"""Starts one command of persona_jax in several processes.

launch/run local --processes 2 -- --config configs/sa.py --workdir runs/sa
launch/run tpu --name NAME --zone ZONE -- --config configs/sa.py:sd15 --workdir /shared/sa
launch/run slurm --nodes 4 --gpus-per-node 8 --time 24:00:00 -- --config … --workdir …
launch/run k8s --name sa --image IMAGE --nodes 4 --claim DISK:/mnt -- --config … --workdir /mnt/sa

Each process runs `python -m persona_jax.train` with the arguments after `--` (--module: another
command). WORKDIR must be visible to all processes. Process 0 writes to the terminal, the others
to process_1.log and so on in WORKDIR/logs. If one process dies, all are ended. SIGTERM or Ctrl-C
saves and stops all. To resume, run the same command again; the number of processes may change.
--dry-run prints what would run.

Needs only Python's standard library. Exit status: 0 success; 2 a user error, in one line; else
that of the process that died first, 128 + n if signal n ended it.
"""

import argparse
import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import clusters
import local

ROOT = Path(__file__).resolve().parents[1]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with status 2."""
        self.exit(2, f"error: {message}; see launch/run --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Parses `argv` (default: sys.argv[1:]), prints or runs; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    own, command = (
        (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    )
    parser = make_parser()
    arguments = parser.parse_args(own)
    if not command:
        parser.error("nothing to run: expected -- --config FILE --workdir DIR at the end")
    try:
        return run(arguments, module_of(arguments.module), command)
    except ValueError as error:
        parser.error(str(error))
    except FileNotFoundError as error:
        parser.error(f"{error.filename}: not found; install it, or use --dry-run")
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")


def run(arguments: argparse.Namespace, module: str, command: Sequence[str]) -> int:
    """Starts or prints the command for the chosen place; returns the exit status.

    Raises ValueError with a one-line message if the arguments do not fit.
    """
    logs = arguments.logs or str(Path(workdir_of(command)) / "logs")
    whole = [arguments.python, "-m", module, *command]
    match arguments.where:
        case "local":
            plan = local.plan(whole, arguments.processes, Path(logs))
            if arguments.dry_run:
                print(local.describe(plan))
                return 0
            return local.run(plan, arguments.grace)
        case "tpu":
            start, stop = clusters.tpu(arguments, whole, logs)
            if arguments.dry_run:
                print(f"{shlex.join(start)}\n# to stop it: {shlex.join(stop)}")
                return 0
            return local.run_with_stop(start, stop)
        case "slurm":
            submit, text = ["sbatch"], clusters.slurm(arguments, whole, logs)
            if not arguments.dry_run:
                Path(logs).mkdir(parents=True, exist_ok=True)
        case "k8s":
            submit, text = ["kubectl", "apply", "-f", "-"], clusters.k8s(arguments, whole)
    if arguments.dry_run:
        print(f"{text}\n# to be read by: {shlex.join(submit)}")
        return 0
    done = subprocess.run(submit, input=text, text=True, check=False)
    if done.returncode == 0:
        print(clusters.follow(arguments, logs))
    return done.returncode


def make_parser() -> Parser:
    """Returns the parser of the launcher's own arguments, which come before ``--``."""
    parser = Parser(
        prog="launch/run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    places = parser.add_subparsers(dest="where", required=True, metavar="local|tpu|slurm|k8s")

    def place(name: str, help: str, python: str) -> argparse.ArgumentParser:
        one = places.add_parser(name, help=help, description=help, allow_abbrev=False)
        one.add_argument(
            "--dry-run", action="store_true", help="print what would run, start nothing"
        )
        one.add_argument("--module", default="train", help="command: train, pretrain, … (train)")
        one.add_argument("--logs", metavar="DIR", help="folder for logs (WORKDIR/logs)")
        one.add_argument("--python", default=python, help=f"Python interpreter there ({python})")
        return one

    one = place("local", "processes on this machine", interpreter())
    one.add_argument("--processes", type=at_least_one, required=True, metavar="N")
    one.add_argument(
        "--grace", type=float, default=120.0, metavar="SECONDS",
        help="time for saving after SIGTERM or Ctrl-C (120)",
    )  # fmt: skip

    one = place("tpu", "all workers of a TPU VM, over gcloud's ssh", ".venv/bin/python")
    one.add_argument("--name", required=True, help="name of the TPU VM")
    one.add_argument("--zone", required=True)
    one.add_argument("--project", help="Google Cloud project (gcloud's default)")
    one.add_argument(
        "--directory", default="persona_jax", help="checkout there, below the home (persona_jax)"
    )

    one = place("slurm", "a job for sbatch, one process per GPU", interpreter())
    one.add_argument("--nodes", type=at_least_one, required=True, metavar="N")
    one.add_argument("--gpus-per-node", metavar="[TYPE:]N")
    one.add_argument("--cpus-per-task", type=at_least_one, metavar="N")
    one.add_argument("--time", metavar="D-HH:MM:SS", help="limit; saves two minutes before it")
    one.add_argument("--partition")
    one.add_argument("--name", default="persona_jax", help="name of the job (persona_jax)")

    one = place("k8s", "a Kubernetes JobSet, one process per pod", "python")
    one.add_argument("--name", required=True, help="name of the JobSet")
    one.add_argument(
        "--image", required=True, help="image with persona_jax installed, or as working directory"
    )
    one.add_argument("--nodes", type=at_least_one, required=True, metavar="N")
    one.add_argument("--gpus-per-node", type=at_least_one, metavar="N")
    one.add_argument("--tpu", metavar="TYPE/TOPOLOGY/CHIPS", help="GKE TPU; CHIPS per node")
    one.add_argument("--claim", metavar="CLAIM:FOLDER", help="volume claim that all pods mount")
    one.add_argument("--namespace")
    one.add_argument(
        "--restarts", type=int, default=10, help="restarts after preemptions and failures (10)"
    )
    return parser


def at_least_one(text: str) -> int:
    """Parses a number of processes or nodes."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least 1")
    return int(text)


def module_of(name: str) -> str:
    """Returns persona_jax.NAME for NAME or persona_jax.NAME. Raises ValueError if it is absent."""
    short = name.removeprefix("persona_jax.")
    if not (ROOT / "persona_jax" / f"{short.replace('.', '/')}.py").is_file():
        raise ValueError(f"argument --module: no persona_jax.{short}; expected train or pretrain")
    return f"persona_jax.{short}"


def workdir_of(command: Sequence[str]) -> str:
    """Returns the value of --workdir, or of --out; the current folder if neither is given."""
    for flag in ("--workdir", "--out"):
        for i, word in enumerate(command):
            if word.startswith(f"{flag}="):
                return word.partition("=")[2]
            if word == flag and i + 1 < len(command):
                return command[i + 1]
    return "."


def interpreter() -> str:
    """Returns this Python if it has JAX, else that of the checkout's .venv if there is one."""
    venv = ROOT / ".venv" / "bin" / "python"
    return (
        str(venv) if importlib.util.find_spec("jax") is None and venv.exists() else sys.executable
    )
