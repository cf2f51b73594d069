"""DreamBooth: fine-tunes the UNet on one person, with prior preservation."""

import common
from ml_collections import ConfigDict


def get_config(preset: str = "tiny") -> ConfigDict:
    return common.personal(preset, method="dreambooth")
