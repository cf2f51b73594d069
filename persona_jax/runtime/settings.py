"""Valid ranges of settings in configs, command-line flags and JSON files, by name.

All ranges are in one table, :data:`RANGES`, so that an invalid value gives the same error wherever
it comes from, before anything is read or computed. Names that are not in the table are not checked.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from persona_jax.errors import UserError

NAMED = 6
"""Maximal number of invalid values named in one error."""
NESTED = (Mapping, ConfigDict)


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, inclusive unless `above` or `below` is set.

    Attributes:
      least, most: the bounds.
      whole: only integers are valid.
      above, below: `least` or `most` itself is invalid.
      zero: whether 0 is valid if it is within the bounds.
    """

    least: float | int = -math.inf
    most: float | int = math.inf
    whole: bool = False
    above: bool = False
    below: bool = False
    zero: bool = True

    def __contains__(self, value: object) -> bool:
        """Whether a value is a number (not a bool) in this range."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        if not (self.whole or math.isfinite(value)):  # isfinite overflows for large integers
            return False
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return low and high and (self.zero or value != 0)

    def __str__(self) -> str:
        """The range in words, for errors: "a whole number from 1 to 64"."""
        text = "a whole number" if self.whole else "a number"
        if self.least > -math.inf:
            text += f" above {self.least:g}" if self.above else f" from {self.least:.10g}"
        if self.most < math.inf:
            text += f" below {self.most:g}" if self.below else f" to {self.most:.10g}"
        elif self.least > -math.inf and not self.above:
            text += " on"
        return text if self.zero else f"{text}, not 0"


def whole(least: int, most: float | int = math.inf, **how: bool) -> Range:
    """A range of integers."""
    return Range(least, most, whole=True, **how)


SHARE = Range(0, 1)
DECAY = Range(0, 1, below=True)
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
COUNT = whole(1)
COUNT_OR_NONE = whole(0)
SEED = whole(0, 2**32 - 1)
SIDE = whole(1, 8192)
PHOTO = whole(1, 2048)
CHANNELS = whole(1, 65536)
GUIDANCE = Range(0, 1000)
FACTOR = Range(-1000, 1000)
STEPS = whole(1, 100_000)
CROP = Range(0, 1, above=True)

RANGES: dict[str, Range] = {
    # of runs
    "seed": SEED,
    "batch_size": COUNT,
    "accumulate": COUNT,
    "log_every": COUNT_OR_NONE,
    "save_every": COUNT_OR_NONE,
    "grid_every": COUNT_OR_NONE,
    "grid.people": COUNT_OR_NONE,
    "grid.samples": COUNT,
    "grid_steps": STEPS,
    "grid_guidance": GUIDANCE,
    "mesh.data": whole(-1, zero=False),
    "mesh.fsdp": whole(-1, zero=False),
    "references.n": COUNT,
    "references.wrong": SHARE,
    "min_snr_gamma": NOT_NEGATIVE,
    "drop.image": SHARE,
    "drop.text": SHARE,
    "drop.both": SHARE,
    "optimizer.learning_rate": SHARE,
    "optimizer.steps": COUNT_OR_NONE,
    "optimizer.warmup_steps": COUNT_OR_NONE,
    "optimizer.b1": DECAY,
    "optimizer.b2": DECAY,
    "optimizer.ema_decay": DECAY,
    "optimizer.weight_decay": Range(0, 100),
    "optimizer.clip_norm": NOT_NEGATIVE,
    "optimizer.muon": Range(0, 100),
    "sampling.steps": STEPS,
    "sampling.guidance": GUIDANCE,
    "sampling.scale": FACTOR,
    "sampling.eta": SHARE,
    "aggregator.depth": whole(0, 64),
    "aggregator.heads": whole(1, 1024),
    "aggregator.width": CHANNELS,
    "aggregator.pooling_heads": whole(1, 1024),
    "image_encoder.face_centre": SHARE,
    "image_encoder.face_side": CROP,
    # of per-person fine-tuning
    "people.count": COUNT,
    "people.at_once": COUNT,
    "prior.weight": Range(0, 1000),
    "prior.pictures": COUNT,
    "prior.steps": STEPS,
    "prior.guidance": GUIDANCE,
    "lora.rank": whole(1, 4096),
    "lora.alpha": Range(0, 1e5, above=True),
    # of data
    "data.crop": CROP,
    "data.test_people": COUNT_OR_NONE,
    "data.validation_people": whole(-1),
    "data.least_photos": COUNT,
    "portraits.photos": COUNT,
    "portraits.size": SIDE,
    # of bases
    "vocab_size": whole(1, 2**24),
    "ema_decay": DECAY,
    "kl_weight": NOT_NEGATIVE,
    "looks_weight": NOT_NEGATIVE,
    "identity_weight": NOT_NEGATIVE,
    "identity_temperature": POSITIVE,
    "captions.full": SHARE,
    "empty_caption": SHARE,
    "timesteps.low": SHARE,
    "timesteps.below": COUNT_OR_NONE,
    "scored": COUNT_OR_NONE,
    "unseen": COUNT_OR_NONE,
    # of towers
    "image_size": SIDE,
    "sample_size": SIDE,
    "patch_size": SIDE,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_channels": CHANNELS,
    "latent_channels": CHANNELS,
    "block_out_channels": CHANNELS,
    "cross_attention_dim": CHANNELS,
    "attention_head_dim": CHANNELS,
    "hidden_size": CHANNELS,
    "intermediate_size": whole(1, 2**20),
    "projection_dim": CHANNELS,
    "num_attention_heads": whole(1, 1024),
    "num_hidden_layers": whole(1, 256),
    "layers_per_block": whole(1, 64),
    "norm_num_groups": CHANNELS,
    "max_position_embeddings": whole(1, 65536),
    "norm_eps": Range(0, 1),
    "layer_norm_eps": Range(0, 1),
    "scaling_factor": Range(0, 1e4, above=True),
    "freq_shift": FACTOR,
    # of schedulers
    "beta_start": Range(0, 1, above=True, below=True),
    "beta_end": Range(0, 1, above=True, below=True),
    "num_train_timesteps": STEPS,
    "steps_offset": whole(0, 1000),
    # of preprocessors
    "crop_size": PHOTO,
    "crop_size.height": PHOTO,
    "crop_size.width": PHOTO,
    "size.shortest_edge": PHOTO,
    "size.height": PHOTO,
    "size.width": PHOTO,
    "rescale_factor": Range(0, 1, above=True),
    "image_mean": FACTOR,
    "image_std": Range(0, 1000, above=True),
}
"""Ranges by the end of a dotted name; the longest match counts. In a sequence, of each number."""


def range_of(name: str) -> Range | None:
    """The valid range of a dotted name; None if the table has none."""
    parts = name.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    return next((RANGES[end] for end in ends if end in RANGES), None)


def faults(values: Mapping[str, Any] | ConfigDict, prefix: str = "") -> list[str]:
    """One line for each invalid value: "batch_size=0: expected a whole number from 1 on".

    Args:
      values: nested. None, and names that are not in the table, are valid.
      prefix: of the names in the lines.
    """
    lines = []
    for key, value in values.items():
        name, allowed = f"{prefix}{key}", range_of(f"{prefix}{key}")
        if isinstance(value, NESTED):
            lines += faults(value, f"{name}.")
        elif isinstance(value, str) and not _is_text(value):
            lines.append(f"{name}={value!r:.80}: expected UTF-8")
        elif allowed is not None and value is not None:
            numbers = (
                value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            )
            if not all(one in allowed for one in numbers):
                lines.append(f"{name}={value!r:.80}: expected {allowed}")
    return lines


def check(values: Mapping[str, Any] | ConfigDict, where: str) -> None:
    """Raises an error if values are outside their ranges.

    Args:
      values: a configuration, or the content of a JSON file.
      where: the source of the values, for the error.

    Raises:
      UserError: names the values and the valid ranges.
    """
    if wrong := faults(values):
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        listed = "; ".join(line if len(line) < 120 else f"{line[:119]}…" for line in wrong[:NAMED])
        raise UserError(f"{where}: {listed[:400]}{more}")


def require(config: Mapping[str, Any] | ConfigDict, types: Mapping[str, type], where: str) -> None:
    """Raises an error if a configuration lacks keys: of another command, or edited.

    Args:
      config: nested.
      types: type of each required key, by dotted name; an integer is valid for a float.
      where: the source of the configuration, for the error.

    Raises:
      UserError: names the keys that are missing or of another type.
    """
    wrong = []
    for name, kind in types.items():
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, NESTED) else None
        of_kind = isinstance(value, (int, float) if kind is float else kind)
        if value is None:
            wrong.append(f"no {name}")
        elif not of_kind or (isinstance(value, bool) and kind is not bool):
            actual = "a section" if isinstance(value, NESTED) else f"{value!r:.40}"
            wrong.append(f"{name}={actual}: expected {kind.__name__}")
    if wrong:
        raise UserError(
            f"{where}: {'; '.join(wrong[:NAMED])}: a configuration of another command, or one that "
            "was edited"
        )


def number(allowed: Range) -> Callable[[str], float | int]:
    """An argparse type: numbers in a range."""

    def convert(text: str) -> float | int:
        try:
            value = int(text) if allowed.whole else float(text)
        except ValueError:
            value = None
        if value is None or value not in allowed:
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected {allowed}")
        return value

    return convert


def text(value: str) -> str:
    """An argparse type: text that can be encoded as UTF-8, such as a prompt."""
    if not _is_text(value):
        raise argparse.ArgumentTypeError(f"{value!r:.40}: expected UTF-8")
    return value


def path(value: str) -> str:
    """An argparse type: a valid path, neither empty nor with a NUL."""
    if not value or "\0" in value:
        raise argparse.ArgumentTypeError(f"{value!r:.40}: expected a path")
    return value


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
