"""A run's workdir: its configuration (config.json) and its environment (run.json)."""

import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from persona_jax.errors import UserError
from persona_jax.runtime import files, settings, untrusted

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "persona-jax")


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The flattened configuration, {"a.b": value}; an empty ConfigDict counts as a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        below = leaves(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {}
        flat |= below or {f"{prefix}{key}": value}
    return flat


def write_run_files(workdir: str | Path, config: ConfigDict) -> None:
    """Writes config.json, for :func:`read_config`, and run.json (command, versions, devices).

    Process 0 writes, the others return at once.

    Raises:
      UserError: the folder cannot be written.
    """
    if jax.process_index() != 0:
        return
    workdir = Path(workdir)
    run = {
        "command": sys.argv,
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("config.json", config.to_json(indent=2)),
            ("run.json", json.dumps(run, indent=2)),
        ):
            with files.whole_file(workdir / name) as beside:
                beside.write_text(text + "\n")
    except OSError as error:
        raise UserError(
            f"workdir {workdir}: {error.strerror}; choose another", argument="workdir"
        ) from error


def read_config(workdir: str | Path) -> ConfigDict:
    """Reads the configuration that :func:`write_run_files` wrote; sequences become tuples.

    Raises:
      UserError: there is no configuration, or it is not JSON.
    """
    path = Path(workdir) / "config.json"
    try:
        return ConfigDict(_tuples(untrusted.read_json(path))).lock()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; is {workdir} a run's workdir?") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a configuration ({error}); was it edited?") from error


RUN = {"method": str, "pipeline": str, "dtype": str, "data.crop": float, "data.data_dir": str}
RUN |= {"sampling.steps": int, "sampling.guidance": float, "sampling.eta": float}
RUN_OF_METHOD = {
    "adapter": {"image_encoder.kind": str, "image_encoder.path": str, "aggregator.kind": str}
    | {"optimizer.ema_decay": float, "references.n": int},
    "dreambooth": {"token": str, "nouns": tuple, "train_text_encoder": bool},
    "lora": {"token": str, "nouns": tuple, "lora.rank": int, "lora.alpha": float},
}
"""Keys that a finished run's configuration must have, by method, with their types."""


def read_run(workdir: str | Path) -> ConfigDict:
    """Reads the configuration of a run of persona_jax.train (see :func:`read_config`).

    Raises:
      UserError: it is of another command, or settings are missing.
    """
    config, where = read_config(workdir), str(Path(workdir) / "config.json")
    settings.require(config, {"method": str}, where)
    if config.method not in RUN_OF_METHOD:
        raise UserError(f"{where}: method={config.method!r:.40}; known: {', '.join(RUN_OF_METHOD)}")
    settings.require(config, RUN | RUN_OF_METHOD[config.method], where)
    return config


def refuse_another_run(workdir: str | Path, config: ConfigDict, keys: Sequence[str]) -> None:
    """Raises an error if the workdir holds a run with another configuration.

    A workdir without config.json holds no run yet.

    Args:
      workdir: of the run.
      config: of the run that is starting.
      keys: names, or beginnings of dotted names, that must be unchanged. Other keys (more steps,
        say) may change.

    Raises:
      UserError: one of the keys differs from the workdir's config.json.
    """
    if not (Path(workdir) / "config.json").exists():
        return
    changes = [
        line
        for line in config_difference(read_config(workdir), config)
        if any(line.startswith((f"{key}:", f"{key}.")) for key in keys)
    ]
    if changes:
        raise UserError(
            f"workdir {workdir} holds another run ({'; '.join(changes[:6])}); "
            "choose another workdir, or continue with that run's configuration",
            argument="workdir",
        )


def config_difference(before: ConfigDict, after: ConfigDict) -> list[str]:
    """One line for each key in which two configurations differ ("a.b: 1, now 2"), by key."""
    old, new = (leaves(ConfigDict(json.loads(config.to_json()))) for config in (before, after))
    return [
        f"{key}: {json.dumps(old[key]) if key in old else 'absent'}, "
        f"now {json.dumps(new[key]) if key in new else 'absent'}"
        for key in sorted(old.keys() | new.keys())
        if (key in old) != (key in new) or old.get(key) != new.get(key)
    ]


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(below) for key, below in value.items()}
    return tuple(_tuples(below) for below in value) if isinstance(value, list) else value
