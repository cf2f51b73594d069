"""Command lines: flags in, one-line errors and exit statuses out.

Exit status 0: done; 2: a mistake of the user's, told in one line; 130: Ctrl-C; 143: stopped by
SIGTERM. Anything else is a bug of ours and shows its traceback.
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
"""Seconds in which the processes of a run that fails take leave of each other."""


def run_with_config(
    main: Callable[[ConfigDict, Path], Any], argv: Sequence[str] | None = None
) -> None:
    """Parse ``--config FILE.py[:ARG] --workdir DIR --config.a.b=value``; run main(config, workdir).

    The file has get_config([arg]) -> ConfigDict of plain values; it may raise UserError for an
    argument it does not know. Unknown flags and keys and values of the wrong type are one-line
    errors. Exits the process on an error. argv: sys.argv where not given.
    """
    argv = list(sys.argv if argv is None else argv)
    _exit_on_error(lambda: main(*_parse_config(argv, main)), {"config", "workdir"}, VERBOSE in argv)


def run_with_arguments(
    parser: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace], Any],
    argv: Sequence[str] | None = None,
) -> None:
    """Parse the command line with ``parser``; run main(arguments). Errors as in run_with_config.

    For entry points without a workdir; argparse takes several values after one flag. A parser with
    a --config gets the configuration in ``arguments.config``, ``--config.a.b=value`` applied.
    """
    argv = list(sys.argv if argv is None else argv)
    parser.error = _refuse
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


def _refuse(message: str) -> None:
    """In place of ArgumentParser.error, which prints the whole usage."""
    raise UserError(f"command line: {message:.400}; see --help")


def _exit_on_error(run: Callable[[], Any], own: AbstractSet[str], verbose: bool = False) -> None:
    """Runs a command. own: names of its flags, without dashes."""
    flags.FLAGS.mark_as_parsed()  # libraries (grain's workers) look there
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
"""Characters of an error; more are printed with --verbose."""


def _tell(error: BaseException, own: AbstractSet[str], verbose: bool = False) -> int:
    """Print a mistake of the user's in a line; return its exit status, or 0 for a bug of ours.

    own: names of the command's flags. verbose: print all of it, its details a line each.
    """
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, UserError):
        text = with_flags(str(error), error.argument, own)
    elif place := _of_the_disk(error):
        text = place
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
    """What a place does not allow, or a disk has no room for; None of another error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in files.DISK:
            return f"{error.filename or 'a file'}: {error.strerror}"
        full = os.strerror(errno.ENOSPC)
        if full in str(error):  # of libraries, whose errors are of their own kinds
            return f"{full} ({type(error).__name__}); make room, then run the same command again"
        error = error.__cause__ or error.__context__
    return None


def with_flags(text: str, argument: str, own: AbstractSet[str]) -> str:
    """An error of the library's with the flags of a command in it: ``config.a.b=`` becomes
    ``--config.a.b=``, and the argument at fault is named as a flag, where the command has them.

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
    """Exit; one process of several does not wait long for the others, as JAX would (5 minutes):
    they may be waiting for what it has failed to do."""
    if not jax.distributed.is_initialized():
        raise SystemExit(status) from None
    sys.stdout.flush()
    sys.stderr.flush()
    goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    goodbye.start()
    goodbye.join(GOODBYE)
    os._exit(status)


def config_parser(about: str | None) -> argparse.ArgumentParser:
    """The command line of what takes a --config. about: the entry point's docstring."""
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
    parser.error = _refuse
    _add_verbose(parser)
    parser.add_argument(
        "--workdir", required=True, type=settings.path, metavar="DIR", help="what this run writes"
    )
    known, overrides = parser.parse_known_args(argv[1:])
    return load_config(known.config, overrides), buckets.local(known.workdir)


def load_config(value: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The configuration that FILE.py[:ARG] names, with ``--config.a.b=value`` flags applied.

    Raises UserError: see :func:`run_with_config`.
    """
    config = _override(_load_config(value), list(overrides))
    settings.check(config, f"--config {value}")
    return config


CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""Those that come with the package; in a checkout, a link to the repository's folder."""


def find_config(path: str) -> Path:
    """The file of a configuration: as named, or one of the package's, by name ("sa") or by its
    place in the repository ("configs/sa.py").

    Raises UserError if there is none.
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
    """FILE.py[:ARG] -> its get_config([ARG]); the file may import its neighbours."""
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
    """Return the config, locked, with ``--config.a.b=value`` flags applied."""
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
    except Exception as error:  # absl's and ml_collections' own kinds, some not flags.Error
        raise UserError(f"command line: {' '.join(str(error).split()):.300}") from error
    if left:
        raise UserError(f"command line: unexpected {left[0]!r:.80}; see --help")
    after = leaves(values.config)
    for key, old in before.items():  # the one type ml_collections does not check
        if (
            isinstance(old, tuple)
            and {type(x) for x in after[key]} - {type(x) for x in old}
            and old
        ):
            raise UserError(
                f"--config.{key}: found {after[key]!r:.150}, expected the like of {old!r:.150}"
            )
    return values.config
