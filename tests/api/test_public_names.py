"""``import persona_jax``: its names, its import time, and what it does not import."""

import json
import subprocess
import sys

import persona_jax

HEAVY = ("torch", "tensorflow", "tensorflow_datasets", "grain", "clu", "array_record", "diffusers")
REPORT = """
import json, sys
names = sorted(sys.modules)
print(json.dumps({"own": [n for n in names if n.startswith("persona_jax")],
                  "roots": sorted({n.split(".")[0] for n in names})}))
"""


def modules_after(code: str, *flags: str) -> tuple[list[str], set[str]]:
    """Returns this package's modules, and all top-level ones, that `code` imports in a process."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code + REPORT], capture_output=True, text=True, check=True
    )
    imported = json.loads(done.stdout.splitlines()[-1])
    return imported["own"], set(imported["roots"])


def test_importing_is_quick_and_imports_nothing_else():
    own, roots = modules_after("import persona_jax")
    assert own == ["persona_jax"]
    assert not roots & {*HEAVY, "jax", "numpy"}
    code = (
        "import time; start = time.perf_counter(); import persona_jax; "
        "assert time.perf_counter() - start < 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_without_data_sets_and_other_frameworks():
    code = "import persona_jax; [getattr(persona_jax, name) for name in persona_jax.__all__]"
    own, roots = modules_after(code)
    assert not roots & set(HEAVY)
    allowed = {"colour", "images", "assets", "photo_decoding"}
    data = {name.split(".")[2] for name in own if name.startswith("persona_jax.data.")}
    assert data <= allowed
    assert not [name for name in own if name.split(".")[1:2] in (["evaluation"], ["base"])]


def test_all_is_what_dir_and_the_table_have():
    assert set(persona_jax.__all__) == {*persona_jax._HOME, "__version__"}
    assert set(persona_jax.__all__) <= set(dir(persona_jax))
    for name in persona_jax.__all__:
        assert getattr(persona_jax, name).__doc__ or name == "__version__"
