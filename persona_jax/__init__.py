"""persona_jax: images of a particular person from a few photos and a prompt, in JAX.

    import persona_jax as pj
    pipe = pj.load_pipeline("tiny")                  # or a folder, a hub id
    adapter = pj.load_adapter("runs/sa", pipe)       # or an IP-Adapter file, an exported folder
    images = pipe("a photo of a smiling person", photos=["a.jpg", "b.jpg"], adapter=adapter, num=4)
    images[0].save("out.png")

Names are imported lazily, at their first use; JAX is imported with them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persona_jax.api.adapters import LoadedAdapter, LoadedPerson, load_adapter, load_person
    from persona_jax.api.generation_job import GenerationJob
    from persona_jax.api.pipeline import PersonaPipeline, load_pipeline
    from persona_jax.api.results import Images, Progress
    from persona_jax.errors import UserError
    from persona_jax.runs.attribution import Attribution
    from persona_jax.runs.finished_run import SamplingSettings
    from persona_jax.runs.reference_sets import ReferenceSet

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "GenerationJob",
    "Images",
    "LoadedAdapter",
    "LoadedPerson",
    "PersonaPipeline",
    "Progress",
    "ReferenceSet",
    "SamplingSettings",
    "UserError",
    "__version__",
    "load_adapter",
    "load_person",
    "load_pipeline",
]

_HOME = {
    "Attribution": "runs.attribution",
    "GenerationJob": "api.generation_job",
    "Images": "api.results",
    "LoadedAdapter": "api.adapters",
    "LoadedPerson": "api.adapters",
    "PersonaPipeline": "api.pipeline",
    "Progress": "api.results",
    "ReferenceSet": "runs.reference_sets",
    "SamplingSettings": "runs.finished_run",
    "UserError": "errors",
    "load_adapter": "api.adapters",
    "load_person": "api.adapters",
    "load_pipeline": "api.pipeline",
}


def __getattr__(name: str) -> Any:
    """Imports a public name from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, and names that are already imported."""
    return sorted({*globals(), *__all__})
