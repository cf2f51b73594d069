"""``persona-jax COMMAND …`` is ``python -m persona_jax.COMMAND …``.

persona-jax train --config sa:tiny --workdir runs/sa
persona-jax sample --workdir runs/sa --photos a.jpg b.jpg --prompt "a smiling person" --out out
"""

import ast
import runpy
import sys
from pathlib import Path

from persona_jax import __version__

COMMANDS = (
    *("pretrain", "encode", "train", "sample", "export", "evaluate", "compare", "score"),
    *("plan", "probe"),
)


def main() -> None:
    """Runs the command named by the first argument."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        print(__version__)
        return
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        print(f"{(__doc__ or '').strip()}\n\n{_listed()}\n\nCOMMAND --help says more.")
        return
    command = sys.argv[1]
    if command not in COMMANDS:
        print(
            f"error: no command {command!r:.60}; there are {', '.join(COMMANDS)}", file=sys.stderr
        )
        raise SystemExit(2)
    del sys.argv[1]
    runpy.run_module(f"persona_jax.{command}", run_name="__main__", alter_sys=True)


def _listed() -> str:
    """The commands, each with the first line of its docstring."""
    lines = []
    for command in COMMANDS:
        about = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{command}.py").read_text()))
        lines.append(f"{command:10}{(about or '').splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
