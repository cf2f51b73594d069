"""What the configs share: data, optimiser and mesh, per preset."""

from ml_collections import ConfigDict

from persona_jax.errors import UserError

PRESETS = {
    "tiny": {
        "pipeline": "tiny",  # comes with the package, and so does a plain adapter
        "init_from": "tiny",
        "flip": False,  # partings and moles have a side
        "data": {"dataset": "portraits", "crop": 1.0},
        "batch_size": 16,
        # After 300 steps the loss is 0.0015 lower than with 1e-3, and no higher than Muon's.
        "optimizer": {"learning_rate": 3e-3, "schedule": "cosine", "steps": 400},
        "sampling": {"steps": 20},
    },
    "lfw": {
        "pipeline": "bases/lfw/pipeline",
        "optimizer": {"steps": 4000},
        "save_every": 500,
        "grid_every": 1000,
    },
    "sd15": {
        "pipeline": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "image_encoder": {"path": "h94/IP-Adapter/models/image_encoder"},
        "aggregator": {"width": 512},
        "batch_size": 64,
        "optimizer": {"learning_rate": 1e-4, "steps": 50000},
        "save_every": 1000,
        "grid_every": 5000,
        "sampling": {"steps": 50, "guidance": 7.5},
    },
}
"""What each preset changes of an adapter's training on a small base."""

PERSONAL = {
    # With a text tower that stays as it is, the rare token calls nobody: whom the noun alone paints
    # is the same person.
    "dreambooth": {"train_text_encoder": True, "optimizer": {"learning_rate": 8e-4, "steps": 50}},
    "lora": {"optimizer": {"learning_rate": 2e-3, "steps": 100}},
}
"""What small bases change of the training of weights that belong to one person."""


def data() -> ConfigDict:
    return ConfigDict(
        {
            # or "folder": one folder per person, named by data.folder; or drawn: "portraits",
            # "portraits2" (128 px and more; no base that ships has seen them yet)
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
            "portraits": {  # who is drawn, where the dataset is drawn
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
        "muon": 0.0,  # AdamW throughout
    }
    return ConfigDict(settings | changes)


def mesh() -> ConfigDict:
    return ConfigDict({"data": -1, "fsdp": 1})


def personal(preset: str, method: str) -> ConfigDict:
    """The training of weights that belong to one person, at one of the presets."""
    check(preset)
    config = ConfigDict(
        {
            "preset": preset,
            "method": method,
            "seed": 0,
            "pipeline": "",  # folder or hub id, or the name of a shipped base
            # What each starts from: a LoRA file for lora, a pipeline folder for dreambooth.
            "init_from": "",
            "people": {"group": "test", "count": 8, "at_once": 1},
            # The same photos that adapters are shown: the first n less the last.
            "references": {"n": 10, "hold_out": True},
            # Rare; before whichever of the nouns is there, it calls the person. The first noun
            # names the class.
            "token": "sks",
            "nouns": ("person", "man", "woman"),
            "captions": True,  # prompts are the photos' captions; False: the two fixed ones
            "prompt": "a photo of a person",
            "prior": {
                "weight": 1.0,  # λ; 0: no prior preservation
                "pictures": 200,
                "prompt": "a photo of a person",
                "steps": 30,
                "guidance": 3.0,
            },
            "data": data(),
            "mesh": mesh(),
            "dtype": "auto",
            "batch_size": 4,  # of the person's photos; as many of the class beside them
            "accumulate": 1,
            "remat": "none",
            "optimizer": optimizer(5e-6, 800, warmup_steps=0),
            "log_every": 20,
            "save_every": 200,
            "sampling": {"steps": 30, "guidance": 3.0, "eta": 0.0},
        }
    )
    if method == "dreambooth":
        config.train_text_encoder = False
    else:
        config.lora = ConfigDict({"rank": 4, "alpha": 4.0})
        config.optimizer.learning_rate = 1e-4
        config.people.at_once = 4
    shared = {"pipeline", "data", "sampling"}
    config.update({key: value for key, value in PRESETS[preset].items() if key in shared})
    if preset != "sd15":
        config.update(PERSONAL[method])
    return config


def check(preset: str) -> None:
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r}; presets: {', '.join(PRESETS)}")


def adapter(preset: str, aggregator: str) -> ConfigDict:
    """An adapter's training at one of the presets."""
    check(preset)
    config = ConfigDict(
        {
            "preset": preset,
            "method": "adapter",
            "seed": 0,
            "pipeline": "",  # folder or hub id, or the name of a shipped base
            "image_encoder": {
                "kind": "clip",  # or "dlib", "facenet"
                # clip: folder or hub id, where the pipeline has none; dlib: its weights, where they
                # are not installed (extra "faces"); facenet: its weights, fetched if empty
                "path": "",
                "sha256": "",  # dlib, facenet: of weights to accept beside those known
                "face_centre": (0.5, 0.532),  # of faces within photos, as fractions
                "face_side": 0.496,
            },
            # Whose adapter to start from: the workdir of an earlier run, a file, a shipped base.
            "init_from": "",
            "aggregator": {
                "kind": aggregator,
                "depth": 2,
                "heads": 8,
                "width": 128,
                "pooling_heads": 8,
            },
            # wrong: share of the examples with a minority of photos of other people among them
            "references": {"n": 10, "fixed": False, "wrong": 0.0},
            "flip": True,
            "drop": {"image": 0.05, "text": 0.05, "both": 0.05},
            "min_snr_gamma": 0.0,  # 0: off
            "data": data(),
            "mesh": mesh(),
            "dtype": "auto",  # bfloat16 on accelerators, float32 on CPU
            "batch_size": 32,
            "accumulate": 1,
            "remat": "none",  # "transformers", "blocks": computed again, where memory is short
            "optimizer": optimizer(1e-3, 1000, ema_decay=0.999),
            "log_every": 20,
            "save_every": 200,
            "grid_every": 500,
            "grid": {"people": 6, "samples": 4},  # no people, no grids
            "sampling": {"steps": 30, "guidance": 3.0, "scale": 1.0, "eta": 0.0},
        }
    )
    config.update(PRESETS[preset])
    return config
