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
            # or "folder": one folder per person, named by data.folder; or "portraits"
            "dataset": "lfw",
            "data_dir": "data",
            "manual_dir": "",  # where the archive lies; data_dir/manual if empty
            "folder": "",
            "archive_sha256": "",  # one more archive to accept beside those known
            "crop": 0.6,  # central square, as a fraction of the photo's shorter side
            "test_people": 100,
            "validation_people": -1,  # -1: all who remain with enough photos
            "least_photos": 10,  # of a validation or test person: nine references and a target
            "seed": 0,  # of the division of people
            "portraits": {  # who is drawn, where the dataset is "portraits"
                "people": {"train": 2048, "validation": 256, "test": 256},
                "photos": 10,
                "size": 64,
                "seed": 0,
            },
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


def adapter(preset: str, aggregator: str) -> ConfigDict:
    """An adapter's training at one of the presets."""
    small = check(preset) == "lfw"
    return ConfigDict(
        {
            "preset": preset,
            "method": "adapter",
            "seed": 0,
            "pipeline": "bases/lfw/pipeline"
            if small
            else "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "image_encoder": {
                "kind": "clip",  # or "dlib"
                # clip: folder or hub id, where the pipeline has none; dlib: its weights, where they
                # are not installed (extra "faces")
                "path": "" if small else "h94/IP-Adapter/models/image_encoder",
                "sha256": "",  # dlib: of weights to accept beside those known
                "face_centre": (0.5, 0.532),  # dlib: the face within the photo, as fractions
                "face_side": 0.496,
            },
            "init_from": "",  # workdir of an earlier run whose adapter to start from
            "aggregator": {
                "kind": aggregator,
                "depth": 2,
                "heads": 8,
                "width": 128 if small else 512,
                "pooling_heads": 8,
            },
            "references": {"n": 10, "fixed": False},
            "flip": True,
            "drop": {"image": 0.05, "text": 0.05, "both": 0.05},
            "min_snr_gamma": 0.0,  # 0: off
            "data": data(),
            "mesh": mesh(),
            "dtype": "auto",  # bfloat16 on accelerators, float32 on CPU
            "batch_size": 32 if small else 64,
            "accumulate": 1,
            "optimizer": optimizer(
                1e-3 if small else 1e-4, 1000 if small else 50000, ema_decay=0.999
            ),
            "log_every": 20,
            "save_every": 200 if small else 1000,
            "grid_every": 500 if small else 5000,
            "grid": {"people": 6, "samples": 4},
            "sampling": {
                "steps": 30 if small else 50,
                "guidance": 3.0 if small else 7.5,
                "scale": 1.0,
                "eta": 0.0,
            },
        }
    )
