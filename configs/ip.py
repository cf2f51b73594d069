"""IP-Adapter with one reference: the first photo of the set."""

import common
from ml_collections import ConfigDict


def get_config(preset: str = "tiny") -> ConfigDict:
    return common.adapter(preset, aggregator="first")
