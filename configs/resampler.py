"""A resampler reads the set of the references' embeddings: IP-Adapter-Plus' layout, over photos."""

import common
from ml_collections import ConfigDict


def get_config(preset: str = "tiny") -> ConfigDict:
    return common.adapter(preset, aggregator="resampler")
