"""Trains a model of this repository on packed token shards, from random weights or from a checkpoint.

    python -m pretrain.train --model . --data runs/data --run-dir runs/base --steps 3000 \\
        --tokenizer runs/tokenizer --export-dir runs/model

To continue a stopped run, give the same command with `--resume`: data order, optimizer, schedule and random state
continue as if it had never stopped. `--resume` with `--steps` no greater than the steps done only exports the model.
Several processes: `accelerate launch --config_file configs/accelerate/fsdp2.yaml --module pretrain.train ...`.

Recipe: AdamW or Muon (optimizers.py) with weight decay on matrices only; warm-up, constant rate, decay (or cosine); clipped
gradients; DeepSeek-V3's auxiliary-loss-free load balancing (arXiv:2412.19437, section 2.1.2), the model's
`update_router_bias` after each step; the multi-token-prediction loss is part of the model's own `loss`.

Written to `--run-dir`: `log.jsonl` (one JSON object a line), `run.json` (options, config, sizes), `checkpoint-NNNNNNNN/` (each
complete or absent), and at the end `figures/` and `report.html`.
"""

import argparse
import importlib.util
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra
from common.outputs import only_run_in, refuse_existing

OPTIMIZERS = ("adamw", "muon")  # of pretrain/optimizers.py
SCHEDULES = ("wsd", "cosine")
STARTS = ("random", "weights")
DSA_STAGES = ("warmup", "sparse")
MANY_PASSES = 4  # through a text


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="python -m pretrain.train", description=__doc__.partition("\n")[0])
    files = parser.add_argument_group("files")
    files.add_argument("--model", type=Path, required=True, help="folder with config.json")
    files.add_argument(
        "--start",
        choices=STARTS,
        default="random",
        help="weights to start from: random, or those in --model (default random)",
    )
    files.add_argument("--data", type=Path, required=True, help="folder written by pretrain.data")
    files.add_argument("--run-dir", type=Path, required=True, help="folder for log and checkpoints")
    files.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --run-dir")
    files.add_argument("--tokenizer", type=Path, help="folder of the tokenizer, for samples and for --export-dir")
    files.add_argument("--export-dir", type=Path, help="write the final bf16 checkpoint here (default: nowhere)")
    files.add_argument(
        "--overwrite",
        action="store_true",
        help="replace weights and tokenizer in --export-dir, and the figures in --figures-dir",
    )
    files.add_argument("--figures-dir", type=Path, help="folder for the PNG files (default RUN_DIR/figures)")
    batch = parser.add_argument_group("batch")
    batch.add_argument("--steps", type=int, required=True, help="optimizer steps of the whole run")
    batch.add_argument(
        "--max-minutes",
        type=float,
        help="let the wsd decay begin early, so that training takes about this many minutes (default: no limit)",
    )
    batch.add_argument("--batch-rows", type=int, default=16, help="rows a step over all processes (default 16)")
    batch.add_argument("--row-tokens", type=int, default=512, help="tokens a row (default 512)")
    batch.add_argument("--accumulation-steps", type=int, default=1, help="micro-batches a step (default 1)")
    batch.add_argument("--mix", help="share of rows by language, as en=0.5,zh=0.5 (default: all of the data's alike)")
    batch.add_argument("--seed", type=int, default=0, help="seed of weights and data order (default 0)")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="muon: for hidden matrices, AdamW for the rest (default adamw)",
    )
    recipe.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak rate (default 1.5e-3)")
    recipe.add_argument("--schedule", choices=SCHEDULES, default="wsd", help="shape of the rate (default wsd)")
    recipe.add_argument("--warmup-steps", type=int, default=100, help="steps of linear rise (default 100)")
    recipe.add_argument("--decay-fraction", type=float, default=0.2, help="share of steps in decay (default 0.2)")
    recipe.add_argument("--final-fraction", type=float, default=0.02, help="last rate / peak (default 0.02)")
    recipe.add_argument("--weight-decay", type=float, default=0.1, help="on matrices only (default 0.1)")
    recipe.add_argument("--max-grad-norm", type=float, default=1.0, help="clip gradients to this norm (default 1)")
    recipe.add_argument("--router-bias-rate", type=float, default=1e-3, help="bias step, V3's gamma (default 1e-3)")
    recipe.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="arithmetic (default auto)"
    )
    recipe.add_argument(
        "--dsa-stage",
        choices=DSA_STAGES,
        help="of a model with an indexer: teach only that, under dense attention, or train all under sparse attention",
    )
    recipe.add_argument("--compile", action="store_true", help="torch.compile the layers")
    reports = parser.add_argument_group("reports")
    reports.add_argument("--tensorboard", action="store_true", help="write RUN_DIR/tensorboard too")
    reports.add_argument(
        "--peak-tflops", type=float, help="peak of a device for MFU (default: what a large matrix product reaches)"
    )
    reports.add_argument("--log-every", type=int, default=10, help="steps between log records (default 10)")
    reports.add_argument("--eval-every", type=int, default=250, help="steps between evaluations (default 250)")
    reports.add_argument("--eval-tokens", type=int, default=32768, help="held-out tokens a language (default 32768)")
    reports.add_argument("--eval-rows", type=int, default=16, help="windows evaluated at once (default 16)")
    reports.add_argument("--checkpoint-every", type=int, default=250, help="steps between checkpoints (default 250)")
    reports.add_argument("--keep-checkpoints", type=int, default=2, help="newest checkpoints kept (default 2)")
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("train"):
    import torch
    import transformers
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import DistributedType, GradientAccumulationPlugin, broadcast, set_seed
    from safetensors import SafetensorError
    from torch import nn
    from torch.distributed.tensor import DTensor
    from tqdm import tqdm
    from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

    from common.card import model_name
    from common.launch import join_processes
    from common.loading import load_config, load_model, new_model
    from pretrain.cost import active_parameters, measure_peak_flops, training_flops_per_token
    from pretrain.data import HeldOut, PretrainingData, batch_of, load_held_out
    from pretrain.evaluate import check_same_tokenizer, evaluate_model, index_recall
    from pretrain.export import EXPORTED_FILES, TOKENIZER_FILES, export_checkpoint
    from pretrain.optimizers import build_optimizer
    from pretrain.plot import DRAWINGS, read_log
    from pretrain.report import write_report

LOSS_PARTS = ("loss", "lm_loss", "mtp_loss", "aux_loss", "index_loss")
SIZES = "sizes.json"  # in a checkpoint, the sizes of its files
SAMPLE_PROMPT_TOKENS, SAMPLE_TOKENS = 8, 40  # tokens of a held-out text, and of the model's continuation
RECALL_WINDOWS = 2  # held-out windows a language on which the indexer's recall is measured; they hold dense attention


# ---------------------------------------------------------------- parts


def learning_rate(
    step: int, steps: int, peak: float, warmup_steps: int, decay_fraction: float, final_fraction: float, schedule: str
) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Args:
        step: in [0, steps).
        steps: length of the whole run.
        peak: the highest rate.
        warmup_steps: steps of linear rise; the first step already has a rate above 0.
        decay_fraction: share of `steps` at the end in which "wsd" falls linearly; unused by "cosine".
        final_fraction: rate after the last step, as a share of `peak`.
        schedule: "wsd" (warm-up, stable, decay) or "cosine" (which falls from the end of the warm-up on).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "wsd":
        decay_steps = max(1, round(steps * decay_fraction))
        done = max(0.0, (step - (steps - decay_steps)) / decay_steps)
        return peak * (1 - (1 - final_fraction) * done)
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * done)))


def choose_precision(choice: str) -> str:
    """Resolve "auto" to accelerate's "bf16" where the hardware multiplies bf16 natively, else to "no" (fp32)."""
    if choice != "auto":
        return {"bf16": "bf16", "fp32": "no"}[choice]
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    # Emulated bf16 on a CPU is several times slower than fp32.
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"


def build_model(model_dir: Path, vocab_size: int, start: str = "random") -> PreTrainedModel:
    """Build an fp32 model from the configuration in `model_dir`, with random weights or those in the folder.

    Raises:
        ValueError: the configuration's vocabulary is smaller than the data's.
    """
    config = load_config(model_dir)
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"vocab_size is {config.vocab_size} in {model_dir}/config.json, but the data holds ids up to "
            f"{vocab_size - 1}; set vocab_size to at least {vocab_size}"
        )
    # fp32 master weights whatever dtype the configuration stores: AdamW's small updates vanish in bf16.
    if start == "weights":
        return load_model(model_dir, dtype=torch.float32)
    return new_model(config, dtype=torch.float32)


def set_dsa_stage(model: PreTrainedModel, stage: str, row_tokens: int) -> None:
    """Prepare a model with a lightning indexer for a stage of DeepSeek-V3.2's training (arXiv:2512.02556).

    "warmup": attention is dense and only the indexer learns, from KL(attention summed over the heads || index scores).
    "sparse": attention reads what the indexer selects; the indexer learns from the same KL over the selected tokens, and
    all else learns from the language-model loss. The indexer's input is detached in both.

    Raises:
        ValueError: the model has no indexer, its loss is off, or the rows are too short to select from.
    """
    config = model.config
    if not config.has_indexer:
        raise ValueError(
            f"--dsa-stage {stage} needs a model with an indexer (index_topk is null); make one out of a V3 checkpoint with "
            "`python -m tools.add_indexer`"
        )
    if not config.index_loss_weight:
        raise ValueError(f"--dsa-stage {stage} trains by the index loss, but index_loss_weight is 0; set it, to 1 say")
    if row_tokens <= config.index_topk:
        raise ValueError(
            f"--row-tokens is {row_tokens}, but index_topk is {config.index_topk}: every token would be selected; use rows "
            f"of more than {config.index_topk} tokens"
        )
    config.index_warmup = stage == "warmup"
    if stage == "warmup":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".indexer." in name)


def router_bias_ranges(model: nn.Module) -> dict[str, list[float]]:
    """Least and greatest selection bias of every router, by the number of its layer; empty for models without routers."""
    ranges = {}
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            layer = next(part for part in name.split(".") if part.isdigit())
            ranges[layer] = [round(value, 5) for value in torch.stack(buffer.aminmax()).tolist()]
    return ranges


@dataclass
class Progress:
    """What a checkpoint knows beyond weights, optimizer and random state.

    Attributes:
        step: optimizer steps done.
        seconds: wall time of the run so far, over all resumptions.
        steps_by_deadline: length of the run that `keep_deadline` decided on; None while there is time.
    """

    step: int = 0
    seconds: float = 0.0
    steps_by_deadline: int | None = None

    def total_steps(self, steps: int) -> int:
        """Length of the whole run when `steps` were asked for."""
        return steps if self.steps_by_deadline is None else min(steps, self.steps_by_deadline)

    def keep_deadline(self, steps: int, decay_fraction: float, max_minutes: float) -> None:
        """Begin the decay once the constant rate has had its share of the time; the decay then takes the rest."""
        stable_fraction = 1 - decay_fraction
        has_time = self.seconds < stable_fraction * max_minutes * 60
        if not has_time and self.steps_by_deadline is None and self.step < stable_fraction * steps:
            self.steps_by_deadline = max(self.step + 1, math.ceil(self.step / stable_fraction))

    def state_dict(self) -> dict:
        """For accelerate's `save_state`."""
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        """For accelerate's `load_state`."""
        self.step, self.seconds, self.steps_by_deadline = (
            state["step"],
            state["seconds"],
            state["steps_by_deadline"],
        )


class IntervalMeans:
    """Means of named numbers since the last `pop`; a number that is None is left out."""

    def __init__(self):
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, float | None]) -> None:
        """Count one step's numbers."""
        for name, value in values.items():
            if value is not None:
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1

    def pop(self) -> dict[str, float]:
        """Return the means and start again."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self.__init__()
        return means


class RunLog:
    """`log.jsonl` of a run, and on request TensorBoard's files beside it; both are continued exactly by a resumed run.

    Args:
        folder: the run's folder.
        step: records after this step are of a run that was stopped, and are dropped.
        tensorboard: write `tensorboard/` too.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool):
        self.path = folder / "log.jsonl"
        kept = [record for record in read_log(self.path) if record["step"] <= step] if self.path.is_file() else []
        partial = folder / "log.jsonl.partial"
        partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8")
        partial.replace(self.path)
        self.tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # needs the optional package

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if self.tensorboard is not None:
            for name, value in flatten(record):
                self.tensorboard.add_scalar(name, value, record["step"])
            self.tensorboard.flush()


def flatten(record: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a log record by their path: `expert_load/3`; of a range, `router_bias/3/0` and `router_bias/3/1`."""
    for name, value in record.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        elif not isinstance(value, str):
            yield f"{prefix}{name}", value


# ---------------------------------------------------------------- checkpoints


def checkpoints_in(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob("checkpoint-*") if path.suffix != ".partial")


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, by the sizes that they were written with; None if nothing is."""
    try:
        sizes = json.loads((checkpoint / SIZES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None  # of an earlier version
    except ValueError:
        return f"{SIZES} is cut"
    for name, size in sizes.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            return f"{name} has {found:,} bytes, {size:,} were written"
    return None


def save_checkpoint(accelerator: Accelerator, run: Path, step: int, keep: int) -> None:
    """Write everything a run needs to go on; a crash while writing leaves earlier checkpoints untouched.

    Raises:
        OSError: it could not be written, for instance because the disk is full; what was written is removed.
    """
    final = run / f"checkpoint-{step:08d}"
    partial = final.with_suffix(".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # torch and safetensors have their own errors for a disk that is full
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):
            raise OSError(
                f"the checkpoint of step {step} could not be written to {run} ({error}); make room there, then go on by the "
                "same command with --resume"
            ) from error
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = [path for path in partial.rglob("*") if path.is_file()]
        sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
        (partial / SIZES).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints_in(run)[:-keep]:
            shutil.rmtree(old)


def prepare_run_folder(run: Path, resume: bool) -> Path | None:
    """The checkpoint to load, if any: the newest that is whole; leftovers of a run that was killed are removed.

    Raises:
        ValueError: the folder holds a run and `resume` is off, or holds none and it is on, or all are damaged.
    """
    checkpoints = checkpoints_in(run)
    if resume and not checkpoints:
        raise ValueError(f"--resume, but {run} holds no checkpoint; drop --resume to start a new run")
    if checkpoints and not resume:
        raise ValueError(f"--run-dir {run} already holds {checkpoints[-1].name}; pass --resume or name another folder")
    for partial in run.glob("checkpoint-*.partial"):  # of a run that was killed while it wrote
        shutil.rmtree(partial, ignore_errors=True)
    for checkpoint in reversed(checkpoints):
        if (damage := damage_of(checkpoint)) is None:
            return checkpoint
        print(f"note: {checkpoint} is damaged ({damage}); going back to the one before", file=sys.stderr)
    if checkpoints:
        raise ValueError(f"--resume, but all checkpoints in {run} are damaged; name another --run-dir to start anew")
    return None


# ---------------------------------------------------------------- training


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: torch.Tensor,
    bos_token_id: int,
    max_grad_norm: float,
    micro_rows: int,
) -> dict[str, float | None]:
    """One optimizer step on the rows of all processes, [B, S], of which each trains on its own.

    The gradient is that of the mean over all tokens of the batch, however it is split over processes and micro-batches,
    which hold different numbers of targets.

    Returns:
        This process's share of each part of the loss (their mean over the processes is the whole), and the gradient norm.

    Raises:
        FloatingPointError: the loss is not finite; the weights are still those before the step.
    """
    own = rows[accelerator.process_index :: accelerator.num_processes]
    parts_of_batch = len(rows) // micro_rows
    targets = (rows[:, 1:] != bos_token_id).sum() / parts_of_batch  # of a micro-batch, the mean over the batch
    means = IntervalMeans()
    grad_norm = None
    for micro_batch in own.split(micro_rows):
        with accelerator.accumulate(model):
            batch = batch_of(micro_batch.to(accelerator.device), bos_token_id)
            output = model(**batch, use_cache=False, num_items_in_batch=targets.to(accelerator.device))
            if not torch.isfinite(output.loss):
                raise FloatingPointError(
                    f"the loss is {output.loss.item()}; resume from the last checkpoint with a lower --learning-rate"
                )
            accelerator.backward(output.loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
                # FSDP2 has a share of it on each process
                grad_norm = (grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm).item()
            optimizer.step()
            optimizer.zero_grad()
        parts = {name: getattr(output, name, None) for name in LOSS_PARTS}
        means.add({name: None if part is None else part.item() for name, part in parts.items()})
    return {**means.pop(), "grad_norm": grad_norm}


def balance_experts(model: nn.Module, bias_rate: float) -> dict[str, float]:
    """Move the router biases towards even load; returns fullest expert / mean by layer (empty without routers)."""
    if not hasattr(model, "update_router_bias"):
        return {}
    loads = model.update_router_bias(bias_rate)
    return {str(layer): (load.max() / load.float().mean()).item() for layer, load in loads.items()}


def run_training(args: argparse.Namespace) -> None:
    """Build everything, train, and export as the command line says.

    Raises:
        ValueError: an option contradicts the data, the model or the run folder; raised before any training.
    """
    precision = choose_precision(args.precision)
    state = join_processes(args.accumulation_steps, precision)
    with only_run_in(args.run_dir) if state.is_main_process else nullcontext():
        _run_training(args, precision)


def _run_training(args: argparse.Namespace, precision: str) -> None:
    accelerator = Accelerator(
        mixed_precision=precision,
        # the plugin, since by the argument a launcher's number would go before the command's
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.accumulation_steps),
        # MTP modules whose loss has no weight get no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if args.batch_rows % (accelerator.num_processes * args.accumulation_steps):
        raise ValueError(
            f"--batch-rows {args.batch_rows} must be a multiple of processes ({accelerator.num_processes}) times "
            f"--accumulation-steps ({args.accumulation_steps})"
        )
    data = PretrainingData(args.data, args.row_tokens, args.batch_rows, parse_mix(args.mix), args.seed)
    accelerator.print(
        "languages in a batch: " + ", ".join(f"{name} {rows} rows" for name, rows in data.quotas.items())
    )
    held_out = load_held_out(args.data, args.row_tokens, args.eval_tokens)
    start_from = prepare_run_folder(args.run_dir, args.resume)

    set_seed(args.seed)
    model = build_model(args.model, data.index["vocab_size"], args.start)
    if args.dsa_stage:
        set_dsa_stage(model, args.dsa_stage, args.row_tokens)
    if precision == "bf16":
        model.set_experts_implementation("grouped_mm")  # autocast then casts all experts at once, not one by one
    for note in find_surprises(args, model, data):
        accelerator.print(f"note: {note}")
    description = describe_run(args, accelerator, model, precision)
    if args.compile:
        for layer in model.model.layers:  # layer by layer: what is alike is compiled once
            layer.compile()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if args.optimizer == "muon":
            raise ValueError(
                "--optimizer muon does not work with DeepSpeed, which cuts matrices into flat pieces; use AdamW, or FSDP2 "
                "(configs/accelerate/fsdp2.yaml)"
            )
        micro_rows = args.batch_rows // accelerator.num_processes // args.accumulation_steps
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = micro_rows
    optimizer = build_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if start_from:
        accelerator.load_state(str(start_from))
    if accelerator.is_main_process:
        (args.run_dir / "run.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    accelerator.print(
        f"{description['parameters']:,} parameters, {description['active_parameters']:,} active, precision {precision}, "
        f"{args.optimizer}, from step {progress.step} to {args.steps}"
    )

    train_to_the_end(args, accelerator, model, optimizer, data, held_out, progress, description)
    accelerator.wait_for_everyone()
    state_dict = accelerator.get_state_dict(model) if args.export_dir else None  # all processes send their shards
    if accelerator.is_main_process:
        finish(args, state_dict)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def find_surprises(args: argparse.Namespace, model: PreTrainedModel, data: PretrainingData) -> list[str]:
    """What works and is hardly meant: rows of the vocabulary that no text has, a rate that is never reached, text that is
    read again and again."""
    notes, vocab_size = [], data.index["vocab_size"]
    passes = data.passes(args.steps)
    language = max(passes, key=lambda name: passes[name])
    if passes[language] > MANY_PASSES:
        notes.append(
            f"--steps {args.steps} goes {passes[language]:.0f} times through the text of {language!r}; beyond about "
            f"{MANY_PASSES} times new text teaches more (arXiv:2305.16264)"
        )
    unused = model.config.vocab_size - vocab_size
    if unused:
        matrices = 1 if model.config.tie_word_embeddings else 2
        notes.append(
            f"vocab_size is {model.config.vocab_size:,} and the data's tokenizer has {vocab_size:,} tokens: "
            f"{unused * matrices * model.config.hidden_size:,} parameters are of tokens that cannot occur; "
            "pretrain.config makes a model for a tokenizer"
        )
    if args.steps <= args.warmup_steps:
        notes.append(
            f"--steps {args.steps} ends inside the warm-up of {args.warmup_steps} steps, so the rate never reaches "
            f"{args.learning_rate:g}; give more steps, or fewer --warmup-steps"
        )
    elif args.schedule == "wsd" and args.warmup_steps > args.steps * (1 - args.decay_fraction):
        notes.append(
            f"the decay begins at step {round(args.steps * (1 - args.decay_fraction))}, inside the warm-up of "
            f"{args.warmup_steps} steps; give fewer --warmup-steps or a smaller --decay-fraction"
        )
    return notes


@torch.no_grad()
def write_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: dict[str, HeldOut], device: torch.device
) -> dict[str, dict[str, str]]:
    """By language how a held-out text begins, and what the model goes on with; the run's random state stays as it is."""
    samples, was_training = {}, model.training
    model.eval()
    with torch.random.fork_rng():
        for language, text in held_out.items():
            torch.manual_seed(0)
            prompt = text.windows[:1, :SAMPLE_PROMPT_TOKENS].to(device)
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=SAMPLE_TOKENS,
                do_sample=True,
                temperature=0.7,
                top_p=0.95,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )[0]
            parts = written[: prompt.shape[1]], written[prompt.shape[1] :]
            shown = [tokenizer.decode(part, skip_special_tokens=True) for part in parts]
            samples[language] = dict(zip(("begins", "goes_on"), shown, strict=True))
    model.train(was_training)
    return samples


def describe_run(args: argparse.Namespace, accelerator: Accelerator, model: PreTrainedModel, precision: str) -> dict:
    """What `run.json` keeps and the report shows: options, config, sizes, and what the step's FLOPs are measured by."""
    device = accelerator.device
    if args.peak_tflops:
        peak = args.peak_tflops * 1e12
    else:
        peak = measure_peak_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    return {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "config": model.config.to_dict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "active_parameters": active_parameters(model, getattr(model.config, "num_experts_per_tok", None)),
        "training_flops_per_token": training_flops_per_token(model, args.row_tokens),
        "peak_flops_per_device": peak,
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def train_to_the_end(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: PretrainingData,
    held_out: dict[str, HeldOut],
    progress: Progress,
    description: dict,
) -> None:
    """The loop over optimizer steps: train, balance, and when due log, evaluate and checkpoint."""
    bare_model = accelerator.unwrap_model(model)
    is_main = accelerator.is_main_process
    log = RunLog(args.run_dir, progress.step, args.tensorboard) if is_main else None
    peak_flops = description["peak_flops_per_device"] * accelerator.num_processes
    step_tokens = args.batch_rows * args.row_tokens
    micro_rows = args.batch_rows // accelerator.num_processes // args.accumulation_steps
    means, interval_seconds, interval_steps = IntervalMeans(), 0.0, 0
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    writes_samples = args.tokenizer is not None and is_main and not sharded and not args.compile
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer) if writes_samples else None
    bias_rate = 0.0 if args.dsa_stage == "warmup" else args.router_bias_rate  # only the indexer learns then
    model.train()
    with tqdm(initial=progress.step, total=progress.total_steps(args.steps), unit="step", disable=not is_main) as bar:
        while progress.step < progress.total_steps(args.steps):
            started = time.perf_counter()
            rate = learning_rate(
                progress.step,
                progress.total_steps(args.steps),
                args.learning_rate,
                args.warmup_steps,
                args.decay_fraction,
                args.final_fraction,
                args.schedule,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = data.batch(progress.step)
            numbers = train_step(
                accelerator, model, optimizer, rows, data.bos_token_id, args.max_grad_norm, micro_rows
            )
            load = balance_experts(bare_model, bias_rate)
            means.add({**numbers, **{f"load/{layer}": ratio for layer, ratio in load.items()}})
            progress.step += 1
            seconds = shared_seconds(time.perf_counter() - started, accelerator)
            progress.seconds += seconds
            interval_seconds, interval_steps = interval_seconds + seconds, interval_steps + 1
            if args.max_minutes:
                progress.keep_deadline(args.steps, args.decay_fraction, args.max_minutes)
            bar.total = progress.total_steps(args.steps)
            bar.set_postfix_str(progress_text(numbers, rate, step_tokens / seconds), refresh=False)
            bar.update()

            ends = progress.step == progress.total_steps(args.steps)
            evaluates = progress.step % args.eval_every == 0 or ends
            saves = progress.step % args.checkpoint_every == 0 or ends
            place = {"step": progress.step, "tokens": progress.step * step_tokens}
            # Also before a checkpoint: a resumed run starts a new interval there.
            if progress.step % args.log_every == 0 or saves:
                tokens_per_second = interval_steps * step_tokens / interval_seconds
                mfu = tokens_per_second * description["training_flops_per_token"] / peak_flops
                speed = {"tokens_per_second": round(tokens_per_second), "mfu": round(mfu, 4)}
                record = {
                    **place,
                    "learning_rate": rate,
                    **_nest_load(mean_over_processes(means.pop(), accelerator)),
                    **speed,
                }
                interval_seconds, interval_steps = 0.0, 0
                if is_main:
                    log.write(record)
            if evaluates:
                with accelerator.autocast():
                    bits = evaluate_model(bare_model, held_out, data.bos_token_id, args.eval_rows, accelerator.device)
                    measured = {"bits_per_byte": bits, "router_bias": router_bias_ranges(bare_model)}
                    if bare_model.config.has_indexer:
                        measured["index_recall"] = index_recall(
                            bare_model, held_out, data.bos_token_id, RECALL_WINDOWS, accelerator.device
                        )
                if is_main:
                    bar.write(
                        f"step {progress.step}: " + ", ".join(f"{k} {v:.4f} bits per byte" for k, v in bits.items())
                    )
                    if tokenizer is not None:
                        measured["samples"] = write_samples(bare_model, tokenizer, held_out, accelerator.device)
                    log.write({**place, **measured})
            if saves:
                save_checkpoint(accelerator, args.run_dir, progress.step, args.keep_checkpoints)


def progress_text(numbers: dict[str, float | None], rate: float, tokens_per_second: float) -> str:
    """What the bar says of a step: each part of the loss by its name, in nats, the rate and the speed."""
    names = {"lm_loss": "next token", "mtp_loss": "mtp", "aux_loss": "balance", "index_loss": "indexer"}
    parts = [f"{label} {numbers[name]:.3f}" for name, label in names.items() if numbers.get(name) is not None]
    return ", ".join([*parts, f"rate {rate:.1e}", f"{tokens_per_second:,.0f} tokens/s"])


def mean_over_processes(values: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    """The mean of each number over the processes, which all have the same names."""
    numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(values, accelerator.reduce(numbers, "mean").tolist(), strict=True))


def shared_seconds(seconds: float, accelerator: Accelerator) -> float:
    """The first process's duration, so that all processes agree when the deadline comes."""
    return broadcast(torch.tensor(seconds, dtype=torch.float32, device=accelerator.device)).item()


def _nest_load(means: dict[str, float]) -> dict:
    load = {name.removeprefix("load/"): value for name, value in means.items() if name.startswith("load/")}
    return {**{name: value for name, value in means.items() if not name.startswith("load/")}, "expert_load": load}


def finish(args: argparse.Namespace, state_dict: dict | None) -> None:
    """Write the report with its figures and, if asked, export the model."""
    print(f"report: {write_report(args.run_dir, args.figures_dir)}")
    if args.export_dir:
        export_checkpoint(state_dict, args.model, args.tokenizer, args.export_dir, *card_of(args))
        print(f"exported to {args.export_dir}")
        print(
            f"next: python chat.py --model {args.export_dir}, or python -m pretrain.evaluate {args.export_dir} --data {args.data}"
        )
    else:
        print("next: the same command with --resume and --export-dir FOLDER --tokenizer FOLDER writes the model")


def card_of(args: argparse.Namespace) -> tuple[str, str]:
    """Of the exported model's card, the sentence on how it came to be, and what was measured."""
    records = read_log(args.run_dir / "log.jsonl")
    last = records[-1]
    start = "from nothing" if args.start == "random" else f"from the weights of {model_name(args.model)}"
    what = f"Trained {start} by `pretrain.train`: {last['step']:,} steps, {last['tokens']:,} tokens."
    bits = next((record["bits_per_byte"] for record in reversed(records) if "bits_per_byte" in record), {})
    if not bits:
        return what, ""
    rows = "".join(f"| {language} | {value:.4f} |\n" for language, value in bits.items())
    return what, f"| held-out text | bits per byte |\n|---|---|\n{rows}\n"


# ---------------------------------------------------------------- command line


def parse_mix(text: str | None) -> dict[str, float] | None:
    """Parse `en=0.5,zh=0.5`; None stays None."""
    if text is None:
        return None
    try:
        return {name: float(weight) for name, weight in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise ValueError(
            f"--mix is {text!r}; write LANGUAGE=WEIGHT,LANGUAGE=WEIGHT, for example en=0.5,zh=0.5"
        ) from error


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for options that cannot work, before anything is built."""
    for name in ("steps", "batch_rows", "row_tokens", "accumulation_steps", "log_every", "eval_every"):
        _require_positive(args, name)
    for name in ("checkpoint_every", "keep_checkpoints", "eval_rows", "warmup_steps"):
        _require_positive(args, name)
    for name in ("decay_fraction", "final_fraction"):
        if not 0.0 <= getattr(args, name) <= 1.0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be in [0, 1]")
    if args.max_minutes is not None and (args.max_minutes <= 0 or args.schedule != "wsd"):
        raise ValueError(
            f"--max-minutes is {args.max_minutes} with --schedule {args.schedule}; it must be positive, and the schedule "
            "wsd: only its decay can begin at any time"
        )
    if args.peak_tflops is not None and args.peak_tflops <= 0:
        raise ValueError(f"--peak-tflops is {args.peak_tflops}; it must be positive, or left out to be measured")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package tensorboard; install it, or drop the option")
    if not args.overwrite:
        remedy = "name another folder, or add --overwrite to replace what lies there"
        if args.export_dir:
            files = list(EXPORTED_FILES)
            if args.tokenizer and args.tokenizer.resolve() != args.export_dir.resolve():
                files += TOKENIZER_FILES
            refuse_existing("--export-dir", (args.export_dir / name for name in files), remedy)
        if args.figures_dir:
            refuse_existing("--figures-dir", (args.figures_dir / f"{name}.png" for name in DRAWINGS), remedy)
    if args.export_dir and not args.tokenizer:
        raise ValueError("--export-dir needs --tokenizer, the folder whose tokenizer the data was made with")
    if args.tokenizer:
        check_same_tokenizer(args.tokenizer, args.data)


def _require_positive(args: argparse.Namespace, name: str) -> None:
    if getattr(args, name) < 1:
        raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    check_arguments(args)
    run_training(args)
    return 0


if __name__ == "__main__":
    run_command(main)
