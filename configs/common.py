"""Settings shared by the configs (data, optimiser, mesh), and the presets."""

from ml_collections import ConfigDict

from persona_jax.errors import UserError

PRESETS = {
    "tiny": {
        "pipeline": "tiny",  # the base and plain adapter shipped with the package
        "init_from": "tiny",
        "flip": False,  # partings and moles are on one side
        "data": {"dataset": "portraits", "crop": 1.0},
        "batch_size": 16,
        # After 300 steps, the loss is 0.0015 lower than with 1e-3, and no higher than with Muon.
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
"""Changes that each preset makes to the settings of adapter training."""

PERSONAL = {
    # With a frozen text encoder, a small base gives the same person for prompts with and without
    # the rare token.
    "dreambooth": {"train_text_encoder": True, "optimizer": {"learning_rate": 8e-4, "steps": 50}},
    "lora": {"optimizer": {"learning_rate": 2e-3, "steps": 100}},
}
"""Changes to per-person fine-tuning on the small bases."""


def data() -> ConfigDict:
    return ConfigDict(
        {
            # or "folder": one folder per person, named by data.folder; or drawn: "portraits",
            # "portraits2" (128 px and more; no base that ships has seen them yet)
            "dataset": "lfw",
            "data_dir": "data",
            "manual_dir": "",  # folder of the archive; data_dir/manual if empty
            "folder": "",
            "archive_sha256": "",  # SHA-256 of one more archive to accept
            "crop": 0.6,  # central square, as a fraction of the photo's shorter side
            "test_people": 100,
            "validation_people": -1,  # -1: all remaining people with enough photos
            "least_photos": 10,  # of a validation or test person: nine references and a target
            "seed": 0,  # of the split into groups of people
            "portraits": {  # of the drawn datasets
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
        "muon": 0.0,  # 0: AdamW for all parameters
    }
    return ConfigDict(settings | changes)


def mesh() -> ConfigDict:
    return ConfigDict({"data": -1, "fsdp": 1})


def personal(preset: str, method: str) -> ConfigDict:
    """Returns the config of per-person fine-tuning at one of the presets."""
    check(preset)
    config = ConfigDict(
        {
            "preset": preset,
            "method": method,
            "seed": 0,
            "pipeline": "",  # folder, hub id, or name of a shipped base
            # Initial weights of each person: a LoRA file (lora) or a pipeline folder (dreambooth).
            "init_from": "",
            "people": {"group": "test", "count": 8, "at_once": 1},
            # The photos that adapters get as references: the first n without the last.
            "references": {"n": 10, "hold_out": True},
            # A rare token, put before the prompt's noun, stands for the person. The first noun
            # names the class.
            "token": "sks",
            "nouns": ("person", "man", "woman"),
            "captions": True,  # prompts are the photos' captions; False: the two fixed prompts
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
            "batch_size": 4,  # photos of the person; as many pictures of the class are added
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
    """Returns the config of adapter training at one of the presets."""
    check(preset)
    config = ConfigDict(
        {
            "preset": preset,
            "method": "adapter",
            "seed": 0,
            "pipeline": "",  # folder, hub id, or name of a shipped base
            "image_encoder": {
                "kind": "clip",  # or "dlib", "facenet"
                # clip: folder or hub id, if the pipeline has no image encoder; dlib: weights, if
                # the extra "faces" is not installed; facenet: weights, downloaded if empty
                "path": "",
                "sha256": "",  # dlib, facenet: SHA-256 of other weights to accept
                "face_centre": (0.5, 0.532),  # of faces within photos, as fractions
                "face_side": 0.496,
            },
            # Initial adapter: workdir of an earlier run, adapter file, or name of a shipped base.
            "init_from": "",
            "aggregator": {
                "kind": aggregator,
                "depth": 2,
                "heads": 8,
                "width": 128,
                "pooling_heads": 8,
            },
            # wrong: share of the examples in which a minority of references shows other people
            "references": {"n": 10, "fixed": False, "wrong": 0.0},
            "flip": True,
            "drop": {"image": 0.05, "text": 0.05, "both": 0.05},
            "min_snr_gamma": 0.0,  # 0: off
            "data": data(),
            "mesh": mesh(),
            "dtype": "auto",  # bfloat16 on accelerators, float32 on CPU
            "batch_size": 32,
            "accumulate": 1,
            "remat": "none",  # "transformers" or "blocks": recompute activations to save memory
            "optimizer": optimizer(1e-3, 1000, ema_decay=0.999),
            "log_every": 20,
            "save_every": 200,
            "grid_every": 500,
            "grid": {"people": 6, "samples": 4},  # people 0: no grids
            "sampling": {"steps": 30, "guidance": 3.0, "scale": 1.0, "eta": 0.0},
        }
    )
    config.update(PRESETS[preset])
    return config
