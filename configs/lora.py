"""LoRA: DreamBooth's training, restricted to low-rank updates of the attention projections."""

import common
from ml_collections import ConfigDict


def get_config(preset: str = "tiny") -> ConfigDict:
    return common.personal(preset, method="lora")
