"""What the reader says of pictures: who is on them, and what the photo shows.

The reader is trained on portraits whose every number is known (base/reader.py), on people of its
own. It measures; it never conditions.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from persona_jax.data.portraits.traits import COLOURS, EXPRESSIONS, IDENTITY, REGIONS, SCENE
from persona_jax.errors import UserError
from persona_jax.interop import folders, tensors
from persona_jax.models import trait_network as model

HEADS: model.Heads = (
    ("identity", len(IDENTITY)),
    ("hides", len(REGIONS)),
    ("glasses", 1),
    ("expression", len(EXPRESSIONS)),
    *(
        (name, len(COLOURS))
        for name in ("background", "hat_colour", "band_colour", "scarf_colour", "paint_colour")
    ),
)
"""The reader's questions; colours of things are asked for only where the thing is there."""

SHOWN_BY = {
    "hat_colour": "hides_hair",
    "band_colour": "hides_brows",
    "scarf_colour": "hides_jaw",
    "paint_colour": "hides_skin",
}
"""The entry of a scene that says whether a colour can be seen at all."""


@dataclasses.dataclass(frozen=True)
class Readings:
    """Answers about P pictures.

    Attributes:
      identity: traits.IDENTITY ``[P, 27]``, each about its expected value in [0, 1].
      hides: probability that each region is hidden ``[P, 8]``.
      choices: the most likely index ``[P]`` of each question with several answers, by name;
        "glasses" among them (0 or 1).
      features: the penultimate layer ``[P, F]``.
      classes: probabilities ``[P, 40]`` of expression × background, for the inception score.
    """

    identity: Float[np.ndarray, "P K"]
    hides: Float[np.ndarray, "P R"]
    choices: dict[str, Int[np.ndarray, " P"]]
    features: Float[np.ndarray, "P F"]
    classes: Float[np.ndarray, "P C"]

    @property
    def logits(self) -> Float[np.ndarray, "P C"]:
        """Of the classes, up to a constant."""
        return np.log(np.maximum(self.classes, 1e-12))


@dataclasses.dataclass(frozen=True)
class TraitClassifier:
    """A trained reader.

    Attributes:
      params: its weights.
      spread: root mean square error of each trait on people it has never seen ``[27]``: how much
        its readings wobble.
      size: of the pictures it was trained on, in pixels.
    """

    params: Mapping
    spread: Float[np.ndarray, " K"]
    size: int

    def read(self, pictures: Float[np.ndarray, "P S S 3"], batch_size: int = 64) -> Readings:
        """Readings of pictures in [−1, 1].

        Raises:
          UserError: pictures of another size.
        """
        if pictures.shape[1:] != (self.size, self.size, 3):
            raise UserError(
                f"reader: pictures of {pictures.shape[1:]}, but it reads {self.size} pixels"
            )
        parts = []
        for start in range(0, len(pictures), batch_size):
            part = pictures[start : start + batch_size]
            filled = np.concatenate([part, np.repeat(part[-1:], batch_size - len(part), axis=0)])
            answers = jax.device_get(_answer(self.params, jnp.asarray(filled)))
            parts.append(_first(len(part), answers))
        features, found = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        one_of = [name for name, count in HEADS if count > 1 and name not in ("identity", "hides")]
        expression, background = (found[name] for name in ("expression", "background"))
        classes = _softmax(expression)[:, :, None] * _softmax(background)[:, None, :]
        return Readings(
            identity=found["identity"],
            hides=1 / (1 + np.exp(-found["hides"])),
            choices={name: found[name].argmax(axis=1) for name in one_of}
            | {"glasses": (found["glasses"][:, 0] > 0).astype(np.int64)},
            features=features,
            classes=classes.reshape(len(classes), -1),
        )

    def name(
        self, identity: Float[np.ndarray, "P K"], candidates: Float[np.ndarray, "Q K"]
    ) -> Int[np.ndarray, " P"]:
        """Which of Q known people each reading is nearest to, every trait weighed by how well it
        can be read (naive Bayes with Gaussian errors)."""
        away = (identity[:, None] - candidates[None]) / self.spread
        return (away**2).sum(axis=-1).argmin(axis=1)


@jax.jit
def _answer(params: Mapping, pictures: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    return model.TraitNetwork(HEADS).apply({"params": params}, pictures)


def _first(count: int, tree: Any) -> Any:
    return jax.tree.map(lambda x: x[:count], tree)


def _softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def truth(scene: Float[np.ndarray, "P J"], name: str) -> Int[np.ndarray, " P"]:
    """The right answer to one of a reading's choices, from photos' numbers."""
    return np.rint(scene[:, SCENE.index(name)]).astype(np.int64)


def save_trait_classifier(reader: TraitClassifier, folder: Path) -> None:
    """Writes ``config.json`` and ``model.safetensors``."""
    config = {
        "size": reader.size,
        "heads": [list(head) for head in HEADS],
        "identity": list(IDENTITY),
        "spread": [round(float(value), 5) for value in reader.spread],
    }
    folders.write_json(folder / "config.json", config)
    tensors.save_tree(reader.params, folder / "model.safetensors")


def load_trait_classifier(folder: Path) -> TraitClassifier:
    """Reads what :func:`save_trait_classifier` wrote.

    Raises:
      UserError: no reader there, one with other questions, or tensors that do not fit.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no reader there; bases of drawn people have one beside their pipeline, as "
            "persona_jax.pretrain --config configs/base.py:tiny makes"
        )
    config = folders.read_json(folder / "config.json")
    known = {"heads": [list(head) for head in HEADS], "identity": list(IDENTITY)}
    if any(config.get(key) != value for key, value in known.items()):
        raise UserError(f"{folder}: a reader of other questions than this version asks; train anew")
    module, size = model.TraitNetwork(HEADS), int(config["size"])
    abstract = jax.eval_shape(lambda: model.initialise(module, jax.random.key(0), size))
    files = tensors.TensorFiles(tensors.weight_files(folder), str(folder))
    params = tensors.load_tree(abstract, files, dtype=jnp.float32)
    return TraitClassifier(params, np.asarray(config["spread"], np.float32), size)
