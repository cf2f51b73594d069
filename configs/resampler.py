"""A resampler over the set of the references' embeddings, in IP-Adapter-Plus' layout."""

import common
from ml_collections import ConfigDict


def get_config(preset: str = "tiny") -> ConfigDict:
    config = common.adapter(preset, aggregator="resampler")
    config.init_from = ""  # the shipped adapter is a plain one
    return config
