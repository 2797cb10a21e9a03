"""The schema: YAML and command line, types, ranges, unknown names, help."""

from dataclasses import MISSING, fields

import pytest

from finetune.config import DPOOptions, GRPOOptions, SFTOptions, build_parser, make_options, read_options

REQUIRED = ["--model", "m", "--data", "a.jsonl", "--output", "out"]
SCHEMAS = (SFTOptions, DPOOptions, GRPOOptions)


def test_command_line_goes_before_the_file_and_the_file_before_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("model: m\ndata: [a.jsonl, b.jsonl]\noutput: o\nlearning_rate: 1e-3\nrank: 4\n")
    options = read_options(SFTOptions, ["--config", str(tmp_path / "a.yaml"), "--rank", "2", "--packing"])
    assert (options.data, options.learning_rate, options.rank) == (["a.jsonl", "b.jsonl"], 1e-3, 2)
    assert options.packing
    assert options.seed == 0
    assert not read_options(SFTOptions, [*REQUIRED, "--no-packing"]).packing


def test_rates_and_thresholds_follow_the_method():
    assert read_options(SFTOptions, REQUIRED).peak_rate == 2e-4
    options = read_options(SFTOptions, [*REQUIRED, "--method", "esft"])
    assert (options.peak_rate, options.expert_threshold) == (1e-5, 0.1)
    assert read_options(SFTOptions, [*REQUIRED, "--method", "esft", "--esft-score", "token"]).expert_threshold == 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rat", "1"], "unknown argument '--learning-rat'; did you mean '--learning-rate'"),
        (["--rank", "0"], "rank is 0; it must be a whole number at least 1"),
        (["--rank", "1.5"], "rank is '1.5'; it must be a whole number"),
        (["--rank", "x"], "rank is 'x'"),
        (["--learning-rate", "0"], "learning_rate is 0.0; it must be a number above 0"),
        (["--learning-rate", "nan"], "learning_rate is nan"),
        (["--eval-fraction", "0.95"], "at most 0.9"),
        (["--method", "lara"], "method is 'lara'; did you mean 'lora'"),
        (["--targets", "router"], "targets is 'router'.*choose from attention"),
        (["--method", "full", "--dora"], "dora is True, but method is 'full'"),
        (["--train-router"], "use method full"),
        (["--router-bias-rate", "0.001"], "use method full"),
        (["--balance-loss", "0.1"], "router is frozen"),
        (["--method", "esft", "--mtp-loss", "0.1"], "experts of the main layers only"),
        (["--rslora", "--dora"], "choose one"),
        (["--best-by", "accuracy"], "needs task_data"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        read_options(SFTOptions, [*REQUIRED, *arguments])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown option 'learning_rat'; did you mean 'learning_rate'"),
        ("rank: [1]", r"rank is \[1\]"),
        ("rank: true", "rank is True"),
        ("packing: 1", "packing is 1; it must be true or false"),
        ("method:", "method is empty"),
        ("- a", "must hold lines"),
        ("a: [", "is no YAML file"),
    ],
)
def test_mistakes_in_the_file_are_explained(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_options(SFTOptions, ["--config", str(tmp_path / "a.yaml"), *REQUIRED])


def test_missing_things_are_explained():
    with pytest.raises(ValueError, match="option 'data' is missing: files"):
        read_options(SFTOptions, ["--model", "m", "--output", "o"])
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        read_options(SFTOptions, ["--config", "absent.yaml"])


def test_grpo_wants_whole_groups_and_a_weight_for_each_reward():
    with pytest.raises(ValueError, match="no multiple of generations"):
        read_options(GRPOOptions, [*REQUIRED, "--batch-size", "12"])
    with pytest.raises(ValueError, match="1 entries for 2 rewards"):
        read_options(GRPOOptions, [*REQUIRED, "--rewards", "numeric", "format", "--reward-weights", "1"])


@pytest.mark.parametrize("schema", SCHEMAS)
def test_help_names_every_option_with_its_default(schema):
    text = " ".join(build_parser(schema).format_help().split())
    for f in fields(schema):
        assert "--" + f.name.replace("_", "-") in text
    required = sum(f.default is MISSING and f.default_factory is MISSING for f in fields(schema))
    assert text.count("must be given") == required == 3
    assert text.count("default: ") == len(fields(schema)) - required
    for unit in ("1024 tokens", "in steps; default: none", "2 checkpoints"):
        assert unit in text


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_written_configuration_reads_as_the_same(schema):
    options = read_options(schema, REQUIRED)
    values = {f.name: getattr(options, f.name) for f in fields(schema)}
    assert make_options(schema, values) == options
