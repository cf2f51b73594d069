"""What the configs share: data, optimiser and mesh, per preset."""

from ml_collections import ConfigDict

from persona_jax.errors import UserError

PRESETS = ("lfw", "sd15")


def check(preset: str) -> str:
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r}; presets: {', '.join(PRESETS)}")
    return preset


def data() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": "lfw",  # or "folder": one folder per person, named by data.folder
            "data_dir": "data",
            "manual_dir": "",  # where the archive lies; data_dir/manual if empty
            "folder": "",
            "archive_sha256": "",  # one more archive to accept beside those known
            "crop": 0.6,  # central square, as a fraction of the photo's shorter side
            "test_people": 100,
            "validation_people": -1,  # -1: all who remain with enough photos
            "least_photos": 10,  # of a validation or test person: nine references and a target
            "seed": 0,  # of the division of people
        }
    )


def optimizer(learning_rate: float, steps: int, **changes) -> ConfigDict:
    settings = {
        "learning_rate": learning_rate,
        "schedule": "constant",
        "warmup_steps": 100,
        "steps": steps,
        "b1": 0.9,
        "b2": 0.999,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
    }
    return ConfigDict(settings | changes)


def mesh() -> ConfigDict:
    return ConfigDict({"data": -1, "fsdp": 1})
