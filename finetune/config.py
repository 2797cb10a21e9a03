# ruff: noqa: RUF009 - `option` makes a dataclasses.field, which ruff cannot see
"""Options of the fine-tuning commands: one schema for YAML files, the command line and the help.

    options = read_options(SFTOptions, ["--config", "my.yaml", "--learning-rate", "1e-4"])

A command's options are the fields of one dataclass. A YAML file (`--config`) holds some of them under the same names,
flat; what the command line says goes before the file, and the file before the defaults. A name that no field has is an
error that proposes the nearest one, a value of the wrong type or out of range one that says what is allowed.
"""

import argparse
import math
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from common.command import Parser, did_you_mean, no_command

TARGETS = ("attention", "shared", "dense", "routed", "all")  # what LoRA adapts: groups of finetune/lora.py
METHODS = ("lora", "esft", "full")
FORMATS = ("auto", "messages", "alpaca", "sharegpt", "prompt-completion", "qa", "preference", "text")
QUANTISATIONS = ("none", "nf4", "int8")
TRACKERS = ("tensorboard", "wandb", "none")


def option(
    default: Any, help: str, section: str, *, choices=None, low=None, high=None, above=None, unit: str = ""
) -> Any:
    """A field with what the help, the checks and the documentation need.

    Args:
        default: the default value; `MISSING` for an option that must be given.
        help: one sentence.
        section: heading in the help.
        choices: allowed values (of each entry of a list).
        low, high: smallest and largest allowed number; `above`: numbers must be larger than this.
        unit: what a number counts.
    """
    metadata = {"help": help, "section": section, "choices": choices, "low": low, "high": high, "above": above}
    metadata["unit"] = unit
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata) if default is not MISSING else field(metadata=metadata)


@dataclass(kw_only=True)
class CommonOptions:
    """What all three commands understand."""

    model: str = option(MISSING, "folder or Hub name of the model", "model")
    data: list[str] = option(
        MISSING, "files (.jsonl, .json, .txt) or names in the datasets library, NAME[:CONFIG][:SPLIT]", "data"
    )
    output: str = option(MISSING, "folder for checkpoints, logs, the report and the result in final/", "run")

    trust_remote_code: bool = option(
        False, "let code that comes with the model run, instead of this repository's", "model"
    )
    dtype: str = option(
        "auto",
        "precision of the weights; auto is the checkpoint's, or float32 where bfloat16 would be emulated",
        "model",
        choices=("auto", "float32", "bfloat16"),
    )
    quantise: str = option(
        "none",
        "QLoRA: frozen Linear weights as nf4 (bitsandbytes) or int8 (torchao)",
        "model",
        choices=QUANTISATIONS,
    )
    attention: str | None = option(
        None, "attention implementation, e.g. sdpa or flash_attention_2; none: transformers'", "model"
    )

    format: str = option("auto", "format of --data", "data", choices=FORMATS)
    eval_data: list[str] = option((), "held-out files or names; without them --eval-fraction is used", "data")
    eval_fraction: float = option(0.1, "share of --data that is held out", "data", above=0, high=0.9)
    max_tokens: int = option(
        1024, "longer examples are left out (plain text is cut into pieces)", "data", low=2, unit="tokens"
    )
    preview: bool = option(True, "show one rendered example; what the loss counts is in colour", "data")

    method: str = option("lora", "lora, esft (train whole chosen experts) or full", "method", choices=METHODS)
    targets: list[str] = option(("all",), "what LoRA adapts", "method", choices=TARGETS)
    rank: int = option(16, "width of LoRA's factors; each routed expert gets a pair of its own", "method", low=1)
    alpha: float = option(
        32.0, "LoRA's update is scaled by alpha / rank, with --rslora by alpha / sqrt(rank)", "method", above=0
    )
    dropout: float = option(0.0, "dropout on LoRA's inputs; must be 0 with routed experts", "method", low=0, high=0.99)
    rslora: bool = option(False, "rank-stabilised LoRA (arXiv:2312.03732)", "method")
    dora: bool = option(False, "DoRA (arXiv:2402.09353); not for routed experts", "method")
    esft_score: str = option(
        "gate", "ESFT scores experts by mean gate weight or by share of tokens", "method", choices=("gate", "token")
    )
    esft_threshold: float | None = option(
        None, "ESFT takes the best experts whose scores sum to this share; without it 0.1 for gate, 0.2 for token", "method",
        above=0, high=1,
    )  # fmt: skip
    esft_samples: int = option(256, "training examples that ESFT scores experts on", "method", low=1, unit="examples")
    train_router: bool = option(False, "with --method full: train the router too", "method")
    router_bias_rate: float = option(
        0.0, "with --method full: step of V3's balancing bias after each optimizer step", "method", low=0, high=1
    )

    epochs: float = option(3.0, "passes over the data", "training", above=0)
    steps: int | None = option(None, "optimizer steps, instead of --epochs", "training", low=1, unit="steps")
    batch_size: int = option(8, "examples of a micro-batch on one process", "training", low=1, unit="examples")
    accumulation_steps: int = option(1, "micro-batches of an optimizer step", "training", low=1)
    learning_rate: float | None = option(
        None, "peak rate; without it 2e-4 for lora, 1e-5 for esft and full", "training", above=0
    )
    schedule: str = option(
        "cosine",
        "how the rate falls after the warmup",
        "training",
        choices=("cosine", "linear", "constant_with_warmup"),
    )
    warmup_fraction: float = option(0.05, "share of the steps with a rising rate", "training", low=0, high=1)
    weight_decay: float = option(0.0, "AdamW's decay of what is trained", "training", low=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", "training", above=0)
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, more time", "training"
    )
    bf16: bool = option(False, "autocast to bfloat16", "training")
    seed: int = option(0, "of adapters, data order, dropout and sampling", "training", low=0)

    eval_steps: int | None = option(
        None, "evaluate every so many steps; without it up to ten times, in about a tenth of the time", "evaluation",
        low=1, unit="steps",
    )  # fmt: skip
    eval_examples: int | None = option(
        None, "held-out examples of an evaluation, the first ones; without it all with --eval-steps, else as many as "
        "its share of the time allows", "evaluation", low=1, unit="examples",
    )  # fmt: skip
    task_data: list[str] = option((), "file of questions whose answers are generated and compared", "evaluation")
    answer_tokens: int = option(64, "longest generated answer", "evaluation", low=1, unit="tokens")
    answer_kind: str = option(
        "exact", "compare whole answers, or only their last number", "evaluation", choices=("exact", "number")
    )
    early_stopping: int | None = option(
        None, "stop after so many evaluations in a row without a better one", "evaluation", low=1, unit="evaluations"
    )
    best_by: str = option(
        "loss", "which evaluation result decides on the best checkpoint", "evaluation", choices=("loss", "accuracy")
    )

    save_steps: int | None = option(
        None, "a checkpoint every so many steps; without it at every evaluation", "run", low=1, unit="steps"
    )
    keep_checkpoints: int = option(2, "checkpoints kept, the best among them", "run", low=1, unit="checkpoints")
    log_steps: int | None = option(
        None, "losses are logged every so many steps; without it 50 times a run, but at least every 10 steps", "run",
        low=1, unit="steps",
    )  # fmt: skip
    track: list[str] = option(("tensorboard",), "where curves go besides the report", "run", choices=TRACKERS)
    resume: bool = option(False, "continue an interrupted run in --output from its last checkpoint", "run")
    cpu: bool = option(False, "stay on the CPU even if there is an accelerator", "run")

    def check(self):
        """Raise ValueError for options that contradict each other."""
        if self.method != "lora":
            for name, off in (("quantise", "none"), ("dora", False), ("rslora", False)):
                if getattr(self, name) != off:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, but method is {self.method!r}; it is part of lora"
                    )
        if self.method != "full":
            for name in ("train_router", "router_bias_rate"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} is {getattr(self, name)}, but method is {self.method!r}, whose result does not hold the "
                        "router; use method full"
                    )
        if self.rslora and self.dora:
            raise ValueError("rslora and dora are both on; choose one")
        if self.best_by == "accuracy" and not self.task_data:
            raise ValueError("best_by is 'accuracy', which needs task_data: a file of questions with answers")

    @property
    def peak_rate(self) -> float:
        """The learning rate, with the method's default filled in."""
        return self.learning_rate or (2e-4 if self.method == "lora" else 1e-5)

    @property
    def expert_threshold(self) -> float:
        """ESFT's threshold, with the paper's default for the kind of score filled in."""
        return self.esft_threshold or {"gate": 0.1, "token": 0.2}[self.esft_score]


@dataclass(kw_only=True)
class SFTOptions(CommonOptions):
    """Supervised fine-tuning."""

    packing: bool = option(False, "several examples in a row of --max-tokens, which do not see each other", "data")
    balance_loss: float = option(0.0, "with --train-router: weight of the sequence balance loss", "method", low=0)
    mtp_loss: float = option(
        0.0, "weight of the multi-token-prediction loss; above 0 those modules are trained too", "method", low=0
    )
    teacher: str | None = option(
        None,
        "folder or Hub name of a model with the same tokens, whose distribution is learned instead of the text's",
        "method",
    )
    merge: bool = option(False, "write the whole model with the result merged in too, to merged/", "run")

    def check(self):
        super().check()
        for name in ("mtp_loss", "balance_loss"):
            if self.teacher and getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but with a teacher its distribution is all that is learned"
                )
        if self.merge and self.method == "full":
            raise ValueError(
                "merge is on, but method is 'full', whose result is a whole model already; leave merge out"
            )
        if self.balance_loss and not self.train_router:
            raise ValueError(f"balance_loss is {self.balance_loss}, but the router is frozen; set train_router too")
        if self.mtp_loss and self.method == "esft":
            raise ValueError(f"mtp_loss is {self.mtp_loss}, but method esft trains experts of the main layers only")


@dataclass(kw_only=True)
class DPOOptions(CommonOptions):
    """Direct preference optimisation (arXiv:2305.18290)."""

    beta: float = option(0.1, "how strongly the policy is held to the model it began as", "preference", above=0)
    dpo_loss: str = option(
        "sigmoid", "form of the loss: DPO's, IPO's or the hinge", "preference", choices=("sigmoid", "ipo", "hinge")
    )


@dataclass(kw_only=True)
class GRPOOptions(CommonOptions):
    """Group relative policy optimisation (arXiv:2402.03300) with rewards that a program can verify."""

    rewards: list[str] = option(
        ("numeric",), "what is rewarded: the right number; <think>...</think> before the answer", "reward",
        choices=("numeric", "format"),
    )  # fmt: skip
    reward_weights: list[float] = option((), "one weight a reward; without them 1 each", "reward")
    generations: int = option(8, "answers sampled for each question", "reward", low=2, unit="answers")
    temperature: float = option(1.0, "of sampling", "reward", above=0)
    kl_weight: float = option(0.0, "weight of the divergence from the model it began as", "reward", low=0)

    def check(self):
        super().check()
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(f"reward_weights has {len(self.reward_weights)} entries for {len(self.rewards)} rewards")
        if (self.batch_size * self.accumulation_steps) % self.generations:
            raise ValueError(
                f"batch_size * accumulation_steps is {self.batch_size * self.accumulation_steps}, no multiple of "
                f"generations, {self.generations}; a step holds whole groups of answers"
            )


# ---------------------------------------------------------------- reading


def read_options(schema: type, argv: list[str] | None = None, prog: str = ""):
    """Options from the command line and the YAML file it names.

    Raises:
        ValueError: a name is unknown, a value is of the wrong type or out of range, or an option is missing.
        FileNotFoundError: the YAML file does not exist.
    """
    parser = build_parser(schema, prog)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(parser.unknown(unknown[0]))
    given = vars(given)
    path = given.pop("config", None)
    values = _read_yaml(Path(path), schema) if path else {}
    values |= given
    return make_options(schema, values)


def make_options(schema: type, values: dict[str, Any]):
    """Check values by the schema and fill in its defaults. Raises ValueError as `read_options`."""
    known = {f.name: f for f in fields(schema)}
    for name in values:
        if name not in known:
            raise ValueError(f"unknown option {name!r}{did_you_mean(name, known)}")
    missing = [f.name for f in known.values() if _default(f) is MISSING and values.get(f.name) in (None, [])]
    if missing:
        raise ValueError(f"option {missing[0]!r} is missing: {known[missing[0]].metadata['help']}")
    options = schema(**{name: _convert(known[name], value) for name, value in values.items()})
    options.check()
    return options


def build_parser(schema: type, prog: str = "") -> Parser:
    """The command line of a schema; values that are not given do not appear in the result."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--OPTION VALUE ...]",
        description=schema.__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with any of the options below, names with underscores"
    )
    groups = {}
    for f in fields(schema):
        section = f.metadata["section"]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        flag, base, is_list = "--" + f.name.replace("_", "-"), _base_type(f.type), _is_list(f.type)
        if base is bool:
            groups[section].add_argument(flag, action=argparse.BooleanOptionalAction, help=_help(f))
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[base]
            nargs: dict[str, Any] = {"nargs": "*"} if is_list else {}
            groups[section].add_argument(flag, metavar=metavar, help=_help(f), **nargs)
    return parser


def _help(f) -> str:
    """The help of one option: what it is, its values, its unit and its default."""
    parts = [f.metadata["help"]]
    if f.metadata["choices"]:
        parts.append(f"one of {', '.join(f.metadata['choices'])}")
    default = _default(f)
    if default is MISSING:
        shown = "must be given"
    elif default is None or default == []:
        shown = "default: none"
    elif isinstance(default, bool):
        shown = f"default: {'on' if default else 'off'}"
    else:
        shown = f"default: {' '.join(default) if isinstance(default, list) else default}"
        shown += f" {f.metadata['unit']}" if f.metadata["unit"] else ""
    unit = f"in {f.metadata['unit']}; " if f.metadata["unit"] and default in (None, MISSING) else ""
    return ("; ".join(parts) + f" ({unit}{shown})").replace("%", "%%")


def _default(f):
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _is_list(annotation) -> bool:
    return typing.get_origin(annotation) is list


def _base_type(annotation) -> type:
    """list[str] -> str, int | None -> int."""
    if _is_list(annotation):
        return typing.get_args(annotation)[0]
    if isinstance(annotation, types.UnionType):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _convert(f, value):
    base = _base_type(f.type)
    if _is_list(f.type):
        values = value if isinstance(value, list) else [value]
        return [_check(f, _scalar(f, base, entry)) for entry in values]
    if value is None or (value == "none" and isinstance(f.type, types.UnionType)):
        if not isinstance(f.type, types.UnionType):
            raise ValueError(f"{f.name} is empty; it must be {_describe(f)}")
        return None
    return _check(f, _scalar(f, base, value))


def _scalar(f, base: type, value):
    wrong = ValueError(f"{f.name} is {value!r}; it must be {_describe(f)}")
    if base is bool:
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(value, bool | list | dict):
        raise wrong
    if base is str:
        return str(value)
    try:
        number = float(value)  # YAML reads 1e-4, which has no point, as text
        if base is int and number != int(number):
            raise wrong
        return base(number)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None


def _check(f, value):
    choices, low, high, above = (f.metadata[name] for name in ("choices", "low", "high", "above"))
    if choices and value not in choices:
        raise ValueError(f"{f.name} is {value!r}{did_you_mean(value, choices)}; choose from {', '.join(choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{f.name} is {value}; it must be {_describe(f)}")
    if (
        (low is not None and value < low)
        or (high is not None and value > high)
        or (above is not None and value <= above)
    ):
        raise ValueError(f"{f.name} is {value}; it must be {_describe(f)}")
    return value


def _describe(f) -> str:
    kind = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[_base_type(f.type)]
    bounds = [
        text.format(f.metadata[name])
        for name, text in (("low", "at least {}"), ("above", "above {}"), ("high", "at most {}"))
        if f.metadata[name] is not None
    ]
    return f"{kind} {' and '.join(bounds)}".strip()


def _read_yaml(path: Path, schema: type) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must hold lines `option: value`")
    known = [f.name for f in fields(schema)]
    for name in values:
        if name not in known:
            raise ValueError(f"{path}: unknown option {name!r}{did_you_mean(name, known)}")
    return values


if __name__ == "__main__":
    no_command("fine-tune by python -m finetune.sft, .dpo or .grpo")
