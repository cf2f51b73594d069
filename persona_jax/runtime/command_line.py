"""Command lines: parsing of flags and configs, one-line errors, exit statuses.

Exit status 0: success; 2: a user's error, printed in one line; 130: Ctrl-C; 143: stopped by
SIGTERM. Any other error is a bug of this package and prints its traceback.
"""

import argparse
import difflib
import errno
import os
import re
import runpy
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from persona_jax.errors import UserError
from persona_jax.runtime import buckets, files, memory, settings
from persona_jax.runtime.compilation import keep_compiled
from persona_jax.runtime.mesh import use_cpu_cores
from persona_jax.runtime.run_folder import leaves

GOODBYE = 5.0
"""Shutdown timeout in seconds for the processes of a run that fails."""


def run_with_config(
    main: Callable[[ConfigDict, Path], Any], argv: Sequence[str] | None = None
) -> None:
    """Parses ``--config FILE.py[:ARG] --workdir DIR --config.a.b=value`` and calls `main`.

    The file defines get_config([arg]) -> ConfigDict of plain values; it may raise UserError for an
    unknown argument. Unknown flags, unknown keys and values of the wrong type are one-line errors.
    Exits the process on an error.

    Args:
      main: called with the config and the workdir.
      argv: command line with the program's name first; None: ``sys.argv``.
    """
    argv = list(sys.argv if argv is None else argv)
    _exit_on_error(lambda: main(*_parse_config(argv, main)), {"config", "workdir"}, VERBOSE in argv)


def run_with_arguments(
    parser: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace], Any],
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the command line with `parser` and calls `main`; for commands without a workdir.

    If the parser has a flag --config, ``arguments.config`` is the loaded configuration with
    ``--config.a.b=value`` applied. Errors are handled as in :func:`run_with_config`.

    Args:
      parser: of the command.
      main: called with the parsed arguments.
      argv: command line with the program's name first; None: ``sys.argv``.
    """
    argv = list(sys.argv if argv is None else argv)
    _refuse_in_one_line(parser)
    _add_verbose(parser)
    own = {action.dest for action in parser._actions if action.option_strings}
    _exit_on_error(lambda: main(_parse_arguments(parser, argv[1:])), own, VERBOSE in argv)


VERBOSE = "--verbose"


def _add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(VERBOSE, action="store_true", help="errors list everything they are about")


def _parse_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    arguments, overrides = parser.parse_known_args(argv)
    if "config" not in arguments:
        return parser.parse_args(argv)
    arguments.config = load_config(arguments.config, overrides)
    return arguments


def _refuse_in_one_line(parser: argparse.ArgumentParser) -> None:
    parser.error = _refuse  # type: ignore[method-assign]  # the callers made the parser


def _refuse(message: str) -> NoReturn:
    """Replaces ArgumentParser.error, which prints the whole usage."""
    raise UserError(f"command line: {message:.400}; see --help")


def _exit_on_error(run: Callable[[], Any], own: AbstractSet[str], verbose: bool = False) -> None:
    """Runs a command and exits on an error. own: names of its flags, without dashes."""
    flags.FLAGS.mark_as_parsed()  # libraries (grain's workers) read them
    keep_compiled()
    memory.give_back_after_compilation()
    use_cpu_cores()
    try:
        with buckets.keeping():
            run()
    except (Exception, KeyboardInterrupt) as error:
        status = _tell(error, own, verbose)
        if not status:
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
        _leave(status or 1)


LONGEST = 480
"""Maximal number of characters of an error; --verbose prints all of it."""


def _tell(error: BaseException, own: AbstractSet[str], verbose: bool = False) -> int:
    """Prints a user's error in one line.

    Args:
      error: that ended the command.
      own: names of the command's flags.
      verbose: print the error in full, with one line for each of its details.

    Returns:
      The exit status; 0 if it is a bug of this package, of which nothing is printed.
    """
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, UserError):
        text = with_flags(str(error), error.argument, own)
    elif message := _of_the_disk(error):
        text = message
    else:
        return 0
    details = getattr(error, "details", ())
    if not verbose and (len(text) > LONGEST or details):
        more = " (--verbose: all of it)"
        text = text if len(text) + len(more) <= LONGEST else f"{text[: LONGEST - len(more) - 1]}…"
        text += more
    print(f"error: {text}", file=sys.stderr)
    for line in details if verbose else ():
        print(f"  {line}", file=sys.stderr)
    return 2


def _of_the_disk(error: BaseException | None) -> str | None:
    """The message for an error of the disk (no permission, no space); None for other errors."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in files.DISK:
            return f"{error.filename or 'a file'}: {error.strerror}"
        full = os.strerror(errno.ENOSPC)
        if full in str(error):  # libraries raise exceptions of their own kinds
            return f"{full} ({type(error).__name__}); make room, then run the same command again"
        error = error.__cause__ or error.__context__
    return None


def with_flags(text: str, argument: str, own: AbstractSet[str]) -> str:
    """Rewrites a library error for a command: names of arguments become flags.

    ``config.a.b=`` becomes ``--config.a.b=``, and the argument at fault is named as a flag, if the
    command has that flag.

    Args:
      text: of the error.
      argument: see :class:`persona_jax.errors.UserError`.
      own: names of the command's flags, without dashes.
    """
    if "config" in own:
        text = re.sub(r"(?<![-\w.])config\.(?=[\w.]+=)", "--config.", text)
    if not argument or argument not in own:
        return text
    begins = re.match(rf"{re.escape(argument)}\b", text)
    return f"--{text}" if begins else f"{text} (--{argument})"


def _leave(status: int) -> NoReturn:
    """Exits the process.

    In a run of several processes, waits for the others at most :data:`GOODBYE` seconds. JAX would
    wait 5 minutes, although the others may wait for the process that failed.
    """
    if not jax.distributed.is_initialized():
        raise SystemExit(status) from None
    sys.stdout.flush()
    sys.stderr.flush()
    shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    shutdown.start()
    shutdown.join(GOODBYE)
    os._exit(status)


def config_parser(about: str | None) -> argparse.ArgumentParser:
    """The parser of a command with a flag --config. about: the command's docstring."""
    parser = argparse.ArgumentParser(
        description=(about or "").strip(),
        epilog="--config.any.key=value sets one key of the configuration",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME[:ARG]",
        help="configuration: one of the package's (sa:tiny), or a file (my/config.py:tiny)",
    )
    return parser


def _parse_config(argv: list[str], main: Callable) -> tuple[ConfigDict, Path]:
    parser = config_parser(sys.modules[main.__module__].__doc__)
    _refuse_in_one_line(parser)
    _add_verbose(parser)
    parser.add_argument(
        "--workdir", required=True, type=settings.path, metavar="DIR", help="what this run writes"
    )
    known, overrides = parser.parse_known_args(argv[1:])
    return load_config(known.config, overrides), buckets.local(known.workdir)


def load_config(value: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads the configuration FILE.py[:ARG] and applies ``--config.a.b=value`` flags.

    Raises:
      UserError: see :func:`run_with_config`.
    """
    config = _override(_load_config(value), list(overrides))
    settings.check(config, f"--config {value}")
    return config


CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""The package's configurations; in a checkout, a link to the repository's folder."""


def find_config(path: str) -> Path:
    """Finds the file of a configuration.

    Args:
      path: a file, or one of the package's by name ("sa") or path ("configs/sa.py").

    Raises:
      UserError: there is no such file.
    """
    file = Path(path)
    if file.is_file():
        return file
    name = file.name.removesuffix(".py")
    known = sorted(x.stem for x in CONFIGS.glob("*.py") if x.stem != "common")
    if name in known and path in (name, f"{name}.py", f"configs/{name}.py"):
        return CONFIGS / f"{name}.py"
    raise UserError(
        f"--config {path:.200}: no such file, nor one of the package's: {', '.join(known)}"
    )


def _load_config(value: str) -> ConfigDict:
    """Calls get_config([ARG]) of FILE.py[:ARG]; the file may import modules of its folder."""
    name, *arguments = value.split(":", 1)
    path = str(find_config(name))
    folder = str(Path(path).absolute().parent)
    sys.path.insert(0, folder)
    try:
        config = runpy.run_path(path)["get_config"](*arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config {value}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config {path}: get_config gave {type(config).__name__}, not ConfigDict")
    return config


def _override(config: ConfigDict, overrides: list[str]) -> ConfigDict:
    """Applies ``--config.a.b=value`` flags; returns the config, locked."""
    before = leaves(config)
    for flag in overrides:
        match = re.match(r"--?(?:no)?config\.([^=]*)", flag)
        if match and match[1] not in before and f"no{match[1]}" not in before:
            near = difflib.get_close_matches(match[1], before, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"--config.{match[1]:.80}: no such key{hint}")
    values = flags.FlagValues()
    argv = ["", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        left = values(argv)[1:]
    except Exception as error:  # absl and ml_collections also raise other kinds than flags.Error
        raise UserError(f"command line: {' '.join(str(error).split()):.300}") from error
    if left:
        raise UserError(f"command line: unexpected {left[0]!r:.80}; see --help")
    after = leaves(values.config)
    for key, old in before.items():  # ml_collections does not check the elements of tuples
        if (
            isinstance(old, tuple)
            and {type(x) for x in after[key]} - {type(x) for x in old}
            and old
        ):
            raise UserError(
                f"--config.{key}: found {after[key]!r:.150}, expected the like of {old!r:.150}"
            )
    return values.config
