"""IP-Adapter over the element-wise maximum of the references' embeddings."""

import common
from ml_collections import ConfigDict


def get_config(preset: str = "tiny") -> ConfigDict:
    return common.adapter(preset, aggregator="max")
