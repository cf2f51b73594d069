"""Ranges of settings and flags: the same values are refused, in the same words, everywhere."""

import argparse
import json

import pytest
from ml_collections import ConfigDict
from world import ROOT, config_of

from persona_jax.errors import UserError
from persona_jax.runtime import settings, untrusted
from persona_jax.runtime.command_line import load_config
from persona_jax.runtime.run_folder import read_config, read_run, write_run_files

CONFIGS = ("ip", "max", "avg", "sa", "resampler", "dreambooth", "lora")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("preset", ["tiny", "lfw", "sd15"])
def test_every_config_is_within_its_ranges(name, preset, tmp_path):
    config = config_of(name, preset)
    settings.check(config, name)
    write_run_files(tmp_path, config)
    assert read_run(tmp_path) == read_config(tmp_path)


@pytest.mark.parametrize("preset", ["tiny", "lfw"])
def test_configs_of_bases_are_within_their_ranges_and_are_not_runs(preset, tmp_path):
    config = config_of("base", preset)
    settings.check(config, "base")
    write_run_files(tmp_path, config)
    with pytest.raises(UserError, match=r"no method: a configuration of another command"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("batch_size", 0, "a whole number from 1 on"),
        ("batch_size", -1, "a whole number from 1 on"),
        ("accumulate", 0, "a whole number from 1 on"),
        ("seed", 2**32, "a whole number from 0 to 4294967295"),
        ("seed", -1, "a whole number from 0 to 4294967295"),
        ("optimizer.learning_rate", "nan", "a number from 0 to 1"),
        ("optimizer.learning_rate", 1e30, "a number from 0 to 1"),
        ("optimizer.b1", 1.0, "a number from 0 below 1"),
        ("optimizer.clip_norm", -1.0, "a number from 0 on"),
        ("optimizer.ema_decay", 1.5, "a number from 0 below 1"),
        ("drop.image", 1.1, "a number from 0 to 1"),
        ("min_snr_gamma", "inf", "a number from 0 on"),
        ("aggregator.depth", -1, "a whole number from 0 to 64"),
        ("aggregator.heads", 0, "a whole number from 1 to 1024"),
        ("aggregator.width", 0, "a whole number from 1 to 65536"),
        ("mesh.fsdp", 0, "a whole number from -1 on, not 0"),
        ("data.crop", 0.0, "a number above 0 to 1"),
        ("sampling.eta", 2.0, "a number from 0 to 1"),
        ("sampling.guidance", "nan", "a number from 0 to 1000"),
    ],
)
def test_invalid_values_are_refused_when_parsed(key, value, expected):
    file = ROOT / "configs/sa.py"
    with pytest.raises(UserError) as error:
        load_config(str(file), [f"--config.{key}={value}"])
    assert f"{key}=" in str(error.value)
    assert str(error.value).endswith(f"expected {expected}")


@pytest.mark.parametrize(
    ("key", "value"),
    [("lora.alpha", -4.0), ("lora.rank", 0), ("people.at_once", -1), ("prior.weight", -1.0)],
)
def test_invalid_values_of_per_person_configs(key, value):
    with pytest.raises(UserError, match=f"{key}={value}: expected"):
        load_config(str(ROOT / "configs/lora.py"), [f"--config.{key}={value}"])


def test_flags_say_the_same_words():
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--eta", type=settings.number(settings.SHARE))
    parser.add_argument("--num", type=settings.number(settings.COUNT))
    parser.add_argument("--out", type=settings.path)
    parser.add_argument("--prompt", type=settings.text)
    assert vars(parser.parse_args(["--eta", "1", "--num", "3", "--out", "a b"])) == {
        "eta": 1.0, "num": 3, "out": "a b", "prompt": None,
    }  # fmt: skip
    for flag, value, expected in (
        ("--eta", "2", "expected a number from 0 to 1"),
        ("--eta", "nan", "expected a number from 0 to 1"),
        ("--num", "0", "expected a whole number from 1 on"),
        ("--num", "1.5", "expected a whole number from 1 on"),
        ("--num", "9" * 5000, "expected a whole number from 1 on"),
        ("--out", "", "expected a path"),
        ("--out", "a\0b", "expected a path"),
        ("--prompt", "caf\udce9", "expected UTF-8"),
    ):
        with pytest.raises(argparse.ArgumentError, match=expected):
            parser.parse_args([flag, value])


def test_many_faults_are_a_short_line():
    with pytest.raises(UserError) as error:
        settings.check({f"k{i}": {"batch_size": -(10**100)} for i in range(50)}, "file")
    assert len(str(error.value)) < 500
    assert str(error.value).endswith("and 44 more")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[]", "expected a JSON object, found a list"),
        (b"null", "found null"),
        (b'"x"', "found text"),
        (b"3", "found a number"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ', "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b'{"crop_size": 1000000}', "crop_size=1000000: expected a whole number from 1 to 2048"),
        (b'{"norm_eps": NaN}', "norm_eps=nan: expected a number from 0 to 1"),
        (b'{"num_train_timesteps": 1000000000000}', "expected a whole number from 1 to 100000"),
        (b'{"beta_start": true}', "beta_start=True: expected a number above 0 below 1"),
        (b'{"block_out_channels": [4, "x"]}', "expected a whole number from 1 to 65536"),
    ],
)
def test_outside_json(tmp_path, content, expected):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        untrusted.read_json(file)
    assert str(file) in str(error.value)
    assert expected in str(error.value)
    assert len(str(error.value)) < 500


def test_a_runs_configuration_with_what_is_needed_missing(tmp_path):
    write_run_files(tmp_path, config_of("sa"))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["data"], config["sampling"]["steps"]
    config["aggregator"]["heads"] = "many"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: .*aggregator\.heads='many': expected"):
        read_run(tmp_path)
    config["aggregator"]["heads"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no data\.crop; no data\.data_dir; no sampling\.steps"):
        read_run(tmp_path)


def test_names_of_another_kind_pass():
    settings.check(ConfigDict({"new": {"thing": -1}, "text": "x", "none": None}), "config")
