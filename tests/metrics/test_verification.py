"""Verification against scipy, closed forms, and (slow) real faces."""

import collections
import io
import pathlib
import tarfile

import jax
import numpy as np
import PIL.Image
import pytest
import scipy.stats

from persona_jax.errors import UserError
from persona_jax.interop.face_weights import face_crop, load_face_weights
from persona_jax.metrics.verification import auc, make_pairs, verification
from persona_jax.models.face_resnet import FaceResNet

SHARED = pathlib.Path(__file__).resolve().parents[2].parent / "shared"


@pytest.mark.parametrize("levels", [3, 10, None])
def test_auc_is_mann_whitneys_u(levels):
    rng = np.random.default_rng(0)
    same, different = rng.normal(0.7, 1, 83), rng.normal(0, 1, 140)
    if levels:  # few distinct values: many ties
        same, different = (np.round(x * levels / 6) for x in (same, different))
    u = scipy.stats.mannwhitneyu(same, different).statistic
    assert auc(same, different) == pytest.approx(u / (83 * 140), abs=1e-12)


def test_auc_extremes():
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1
    assert auc(np.array([0.0]), np.array([1.0])) == 0
    assert auc(np.zeros(3), np.zeros(5)) == 0.5
    with pytest.raises(UserError, match="0 same and 2 different"):
        auc(np.zeros(0), np.zeros(2))
    with pytest.raises(UserError, match="not finite"):
        auc(np.array([np.nan]), np.zeros(2))


def crowd():
    """Returns one person with 500 photos, nine with 4, ten with one."""
    people = ["famous"] * 500
    people += [f"p{i}" for i in range(9) for _ in range(4)] + [f"q{i}" for i in range(10)]
    return list(np.random.default_rng(0).permutation(people))


def test_pairs_show_the_same_or_different_people():
    people = np.array(crowd())
    same, different = make_pairs(list(people), 2000, seed=3)
    assert same.shape == different.shape == (2000, 2)
    assert (people[same[:, 0]] == people[same[:, 1]]).all()
    assert (same[:, 0] != same[:, 1]).all()
    assert (people[different[:, 0]] != people[different[:, 1]]).all()


def test_people_with_many_photos_do_not_dominate_the_pairs():
    people = np.array(crowd())
    same, different = make_pairs(list(people), 4000, seed=0)
    # Ten people have at least two photos, twenty have one: each should be in a tenth of the same
    # pairs and of the different pairs, within four standard deviations (0.02).
    for name in ("famous", "p0", "p8"):
        assert np.mean(people[same[:, 0]] == name) == pytest.approx(0.1, abs=0.02)
        share = np.mean((people[different] == name).any(axis=1))
        assert share == pytest.approx(0.1, abs=0.02)


def test_pairs_follow_the_seed():
    people = crowd()
    for a, b in zip(make_pairs(people, 50, 1), make_pairs(people, 50, 1), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (make_pairs(people, 50, 1)[0] != make_pairs(people, 50, 2)[0]).any()


@pytest.mark.parametrize(
    ("people", "count"), [(["a", "b"], 5), (["a", "a"], 5), (["a", "a", "b"], 0), ([], 5)]
)
def test_pairs_that_cannot_be_drawn(people, count):
    with pytest.raises(UserError, match="two people and a person with two photos"):
        make_pairs(people, count, 0)


def noisy_people(noise, persons=60, photos=5, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.standard_normal((persons, dim)), photos, axis=0)
    people = [f"p{i}" for i in range(persons) for _ in range(photos)]
    return centres + noise * rng.standard_normal(centres.shape), people


def test_verification_of_clear_and_of_meaningless_embeddings():
    clear = verification(*noisy_people(1e-3), count=500)
    assert clear["auc"] > 0.999
    assert clear["accuracy"] > 0.99
    x, people = noisy_people(1.0)
    shuffled = list(np.random.default_rng(5).permutation(people))
    chance = verification(x, shuffled, count=500)
    assert chance["auc_low"] < 0.5 < chance["auc_high"]
    assert chance["accuracy"] < 0.56


def test_verification_agrees_with_pairs_scored_by_hand():
    x, people = noisy_people(0.8)
    result = verification(x, people, count=400, seed=7)
    same, different = make_pairs(people, 400, 7)
    cosines = [
        np.array([x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for i, j in pairs])
        for pairs in (same, different)
    ]
    u = scipy.stats.mannwhitneyu(*cosines).statistic / 400**2
    assert result["auc"] == pytest.approx(u, abs=1e-9)
    assert result["auc_low"] < result["auc"] < result["auc_high"]
    # No other threshold is more accurate, and the returned one has the returned accuracy.
    accuracy = [
        (np.mean(cosines[0] >= t) + np.mean(cosines[1] < t)) / 2 for t in np.concatenate(cosines)
    ]
    assert result["accuracy"] == pytest.approx(max(accuracy), abs=1e-9)
    t = result["threshold"] - 1e-9
    named = (np.mean(cosines[0] >= t) + np.mean(cosines[1] < t)) / 2
    assert named == pytest.approx(max(accuracy), abs=1e-9)


def test_scale_does_not_matter_and_centre_does():
    x, people = noisy_people(0.8)
    plain = verification(x, people, count=300)
    assert verification(1e3 * x, people, count=300)["auc"] == pytest.approx(plain["auc"])
    # A common component hides the differences between people; centring removes it.
    drowned = verification(x.astype(np.float32) + 100, people, count=300)
    mended = verification(x + 100, people, count=300, centre=np.full(8, 100.0))
    assert drowned["auc"] < plain["auc"] - 0.01
    assert mended["auc"] == pytest.approx(plain["auc"], abs=1e-6)


def test_interval_covers_about_95_percent():
    # The AUC of many people, and how often the interval from 40 of them contains it.
    truth = verification(*noisy_people(0.9, persons=2000, seed=99), count=20_000)["auc"]
    results = [
        verification(*noisy_people(0.9, persons=40, seed=s), count=300, seed=s) for s in range(40)
    ]
    covered = np.mean([r["auc_low"] <= truth <= r["auc_high"] for r in results])
    assert covered >= 0.85  # 95 % within the chance of 40 draws


def test_bad_embeddings_are_named():
    x, people = noisy_people(1.0)
    with pytest.raises(UserError, match="300 embeddings for 299 photos"):
        verification(x, people[:-1])
    x[7] = 0
    with pytest.raises(UserError, match=r"1 embeddings are zero .* photo 7 \(p1\)"):
        verification(x, people)


@pytest.mark.slow
def test_dlib_verifies_real_people():
    """2,000 pairs of the LFW people with ten photos or more, fixed crop, uint8 weights."""
    archive = SHARED / "lfw/lfw-deepfunneled.tgz"
    weights = SHARED / "weights/face_recognition_dlib_resnet"
    if not (archive.is_file() and weights.is_dir()):
        pytest.skip("no ../shared/lfw/lfw-deepfunneled.tgz or face_recognition_dlib_resnet")
    photos = collections.defaultdict(dict)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                data = tar.extractfile(member).read()
                photos[pathlib.PurePath(member.name).parent.name][member.name] = data
    chosen = [
        (person, data[name])
        for person, data in sorted(photos.items())
        if len(data) >= 10
        for name in sorted(data)[:10]
    ]
    chips = np.stack([face_crop(PIL.Image.open(io.BytesIO(data))) for _, data in chosen])
    params = jax.device_put(load_face_weights(weights))
    embed = jax.jit(FaceResNet().apply)
    batches = [chips[i : i + 35] for i in range(0, len(chips), 35)]
    embeddings = np.concatenate([np.asarray(embed({"params": params}, b)) for b in batches])
    result = verification(embeddings, [person for person, _ in chosen], count=1000)
    print(result)
    assert result["auc"] > 0.97
