"""Self-attention over the set of the references' embeddings: this project's contribution."""

import common
from ml_collections import ConfigDict


def get_config(preset: str = "tiny") -> ConfigDict:
    return common.adapter(preset, aggregator="self_attention")
