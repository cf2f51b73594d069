"""The reader learns what is drawn, is blamed only for what shows, and is kept whole."""

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from persona_jax.base import trait_classifier_training as stage
from persona_jax.data.portraits import traits
from persona_jax.errors import UserError
from persona_jax.evaluation import trait_classifier as reading
from persona_jax.models import trait_network as model
from persona_jax.runtime.mesh import make_mesh


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a reader of two steps."""
    workdir = tmp_path_factory.mktemp("reader")
    optimizer = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 1, "steps": 2}
    optimizer |= {"b1": 0.9, "b2": 0.999, "weight_decay": 0.0, "clip_norm": 1.0, "muon": 0.0}
    config = ConfigDict(
        {
            "seed": 0,
            "image_size": 32,
            "save_every": 0,
            "log_every": 1,
            "reader": {"batch_size": 8, "noise": 0.1, "unseen": 16, "optimizer": optimizer},
        }
    )
    stage.train_trait_classifier(config, workdir, make_mesh())
    return workdir / "reader"


def test_it_is_scored_on_people_it_has_not_seen(trained):
    scores = stage.score_trait_classifier(trained, people=32)
    assert set(scores["traits"]) == set(traits.IDENTITY)
    assert 0.1 < scores["identity"] < 2
    assert all(0 <= scores[name] <= 1 for name in ("named", "hides", "glasses", "expression"))


def test_saving_keeps_every_answer(trained, tmp_path):
    reader = reading.load_trait_classifier(trained)
    reading.save_trait_classifier(reader, tmp_path / "again")
    again = reading.load_trait_classifier(tmp_path / "again")
    pictures = np.random.default_rng(0).uniform(-1, 1, (5, 32, 32, 3)).astype(np.float32)
    one, other = reader.read(pictures), again.read(pictures, batch_size=4)
    np.testing.assert_allclose(one.identity, other.identity, atol=1e-5)
    np.testing.assert_array_equal(one.choices["background"], other.choices["background"])
    np.testing.assert_allclose(one.classes.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(reader.spread, again.spread, atol=1e-5)


def test_a_reader_of_other_questions_is_refused(trained, tmp_path):
    config = tmp_path / "config.json"
    config.write_text((trained / "config.json").read_text().replace("beard", "wig"))
    with pytest.raises(UserError, match="other questions"):
        reading.load_trait_classifier(tmp_path)


def test_pictures_of_another_size_are_refused(trained):
    with pytest.raises(UserError, match="32 pixels"):
        reading.load_trait_classifier(trained).read(np.zeros((1, 64, 64, 3), np.float32))


def test_it_names_the_nearest_where_it_reads_well():
    candidates = np.random.default_rng(0).random((8, len(traits.IDENTITY))).astype(np.float32)
    spread = np.full(len(traits.IDENTITY), 0.1, np.float32)
    spread[0] = 10.0  # a trait it cannot read must not decide
    reader = reading.TraitClassifier({}, spread, 64)
    off = candidates.copy()
    off[:, 0] += 5.0
    np.testing.assert_array_equal(reader.name(off, candidates), np.arange(8))


def test_it_is_not_blamed_for_what_is_hidden():
    rng = np.random.default_rng(0)
    identity = np.stack([traits.draw_identity(rng) for _ in range(4)])
    scene = np.stack([traits.draw_scene(rng, 0.0) for _ in range(4)])
    scene[:, traits.SCENE.index("hides_eyes")] = 1
    answers = {name: np.zeros((4, count), np.float32) for name, count in reading.HEADS}
    answers["identity"] = identity.copy()
    eye = traits.IDENTITY.index("eye_size")
    answers["identity"][:, eye] += 1.0
    parts = stage.losses(*jax.tree.map(jax.numpy.asarray, (answers, identity, scene)))
    assert parts["identity"] == 0
    nose = traits.IDENTITY.index("nose_width")
    answers["identity"][:, nose] += 0.1
    parts = stage.losses(*jax.tree.map(jax.numpy.asarray, (answers, identity, scene)))
    # 23 traits show; 12 · 0.1² of one of them.
    np.testing.assert_allclose(parts["identity"], 0.12 / 23, rtol=1e-4)


def test_it_learns_the_background_in_a_few_steps():
    """From ln 8 to well below it: the heads and the flattened map are wired to the picture."""
    module, size = model.TraitNetwork(reading.HEADS, widths=(8, 16), features=32), 32
    params = model.initialise(module, jax.random.key(0), size)
    rng = np.random.default_rng(0)
    identity = np.stack([traits.draw_identity(rng) for _ in range(64)])
    scene = np.stack([traits.draw_scene(rng, 0.2) for _ in range(64)])
    pictures = stage._pictures(identity, scene, size)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, pictures, identity, scene):
        def loss(params):
            _, answers = module.apply({"params": params}, pictures)
            return stage.losses(answers, identity, scene)["background"]

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(40):
        params, state, value = step(params, state, pictures, identity, scene)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]


def test_a_base_without_a_reader(tmp_path):
    with pytest.raises(UserError, match=r"no reader there; .*persona_jax.pretrain"):
        reading.load_trait_classifier(tmp_path / "reader")
