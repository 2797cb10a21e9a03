"""Writes a checkpoint with fewer routed experts: those that do least on calibration text go.

    python -m compress.prune --model path/to/DeepSeek-V2-Lite --output runs/pruned --keep 0.75 --calibration en.jsonl zh.txt
    python -m compress.prune --model . --keep 12 --dry-run

The model runs over the calibration text layer by layer, so memory holds the states of the calibration tokens and a part of
one layer. Bytes of what stays are copied, FP8 with its scales too. Of every group of experts the same number stays, and the
prediction modules are pruned by what they see themselves. The same command goes on after an interruption.

The new folder also has pruning.json, with all scores, and pruning.html, a page that shows what went. What scores mean, what
was measured and what is lost: docs/compression.md.
"""

import argparse
import errno
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra

SCORES = ("reap", "man", "msan", "easy-ep", "frequency")  # as compress.scores has them
DTYPES = ("auto", "float32", "bfloat16")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m compress.prune", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="checkpoint: a folder, or a name on the Hub")
    parser.add_argument("--output", type=Path, help="folder to write; must not exist")
    parser.add_argument("--keep", required=True, help="experts that stay: a number, or a fraction of all such as 0.75")
    parser.add_argument(
        "--calibration", nargs="+", type=Path, metavar="FILE", help="texts or conversations: .txt, .jsonl, .parquet"
    )
    parser.add_argument("--score", choices=SCORES, default="reap", help="what makes an expert matter (%(default)s)")
    parser.add_argument("--tokens", type=int, default=65536, help="calibration tokens of all files (%(default)s)")
    parser.add_argument("--context-tokens", type=int, default=512, help="longest row, in tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample of the files (%(default)s)")
    parser.add_argument("--tokenizer", help="folder or name of the tokenizer (default: the model's)")
    parser.add_argument(
        "--unseen",
        choices=("refuse", "drop"),
        default="refuse",
        help="experts that no calibration token chose: an error, or the first to go (%(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the arithmetic (default: the checkpoint's)"
    )
    parser.add_argument("--device", help="where to calculate (default: an accelerator if there is one)")
    parser.add_argument("--dry-run", action="store_true", help="only say the sizes before and after; reads no weights")
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("train"):
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from tqdm import tqdm

    from common.card import model_name
    from common.costs import Part
    from common.economics import model_parts, mtp_part
    from common.hub import local_folder
    from common.loading import check_device, load_tokenizer
    from common.remote_code import read_config, write_json
    from common.rewrite import refuse_existing, resolve_config
    from compress.calibration import Calibration, check_counts, check_tokenizer, read_calibration
    from compress.layers import LayerByLayer
    from compress.report import write_report
    from compress.rewrite import (
        Job,
        Source,
        Tensor,
        check_space,
        digest,
        error_number,
        explain_interruption,
    )
    from compress.scores import FIELDS, choose, score, sum_visits
    from configuration_deepseek import DeepseekConfig

_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
_OF_EXPERTS = re.compile(
    r"(?P<prefix>(?:model\.)?layers\.(?P<layer>\d+)\.mlp\.)"
    r"(?:experts\.(?P<expert>\d+)\.(?P<rest>.+)|experts\.(?P<stack>\D.*)|gate\.(?P<router>.+))"
)


# ---------------------------------------------------------------- how many


def possible_counts(config: dict) -> range:
    """How many routed experts may stay: as many in each group, and enough for the router to choose from.

    Raises:
        ValueError: the model has no routed experts, or none can go.
    """
    resolved = resolve_config(config)
    total = getattr(resolved, "n_routed_experts", None)
    if not total:
        raise ValueError("The model has no routed experts; there is nothing to prune.")

    def is_possible(count: int) -> bool:
        try:
            return bool(resolve_config({**config, "n_routed_experts": count}))
        except ValueError:
            return False

    counts = [count for count in range(resolved.n_group, total, resolved.n_group) if is_possible(count)]
    if not counts:
        raise ValueError(
            f"`n_routed_experts` is {total} in {resolved.n_group} groups, of which a token visits {resolved.num_experts_per_tok} "
            "experts; none can go."
        )
    return range(counts[0], total, resolved.n_group)


def experts_to_keep(text: str, config: dict) -> int:
    """The number that `--keep` means: a whole number, or with a point a fraction of all.

    Raises:
        ValueError: it is none of the possible numbers, which the message names.
    """
    possible, total = possible_counts(config), resolve_config(config).n_routed_experts
    allowed = f"possible are the multiples of {possible.step} from {possible[0]} to {possible[-1]}"
    allowed += f", that is {possible[0] / total:g} to {possible[-1] / total:g} of {total}"
    try:
        wanted = float(text) * total if "." in text else int(text)
    except ValueError:
        raise ValueError(f"--keep is {text!r}; it must be a number of experts or a fraction: {allowed}.") from None
    if wanted in possible:
        return int(wanted)
    nearest = sorted(sorted(possible, key=lambda count: abs(count - wanted))[:2])
    raise ValueError(
        f"--keep is {text}, {wanted:g} of {total} experts; {allowed}. Nearest: {' and '.join(map(str, nearest))}."
    )


# ---------------------------------------------------------------- measuring


@dataclass
class Measurement:
    """What the experts did to the calibration tokens.

    Attributes:
        sums: by sparse layer, float64 [S files, E, 6]: see `scores.sum_visits`.
        loss: of the model on the calibration text, nats a token.
    """

    sums: dict[int, torch.Tensor]
    loss: float


def measure(model: LayerByLayer, calibration: Calibration, scratch: Path | None = None) -> Measurement:
    """Runs the model over the calibration tokens.

    Args:
        scratch: a folder where the states after the last whole layer are kept, and found by the next run.
    """
    file = None if scratch is None else scratch / "states.safetensors"
    ids, rows, source = calibration.ids, calibration.rows, calibration.source
    start, sums, loss, states = 0, {}, float("nan"), None
    if file is not None and file.exists():
        start, sums, loss, states = _read_states(file, model)
    if states is None:
        states = model.embed(ids)
    experts, own_layers = model.config.n_routed_experts, model.config.num_hidden_layers
    steps = [experts + 1 if model.is_sparse(index) else 1 for index in range(model.num_layers)]
    with tqdm(total=sum(steps), initial=sum(steps[:start]), unit="expert") as progress:
        for index in range(start, model.num_layers):
            progress.set_description(f"layer {index + 1} of {model.num_layers}")
            visits = model.run(index, states, ids, rows, step=progress.update)
            if visits is not None:
                # the last tokens of a row have no token so far ahead: a prediction module gets filling there
                counted = torch.ones(len(ids), dtype=torch.bool)
                for row in rows if index >= own_layers else ():
                    counted[max(row.start, row.stop - (index - own_layers + 1)) : row.stop] = False
                sums[index] = sum_visits(visits, experts, source, len(calibration.names), counted)
            if index == own_layers - 1:
                model.finish(states)
                loss = model.loss(states, ids, rows)
            if file is not None:
                _write_states(file, index + 1, sums, loss, states)
    return Measurement(sums, loss)


def _write_states(file: Path, next_layer: int, sums: dict[int, torch.Tensor], loss: float, states: torch.Tensor):
    part = file.with_suffix(".part")
    tensors = {"states": states.contiguous(), **{f"sums.{index}": value for index, value in sums.items()}}
    try:
        save_file(tensors, part, metadata={"next_layer": str(next_layer), "loss": repr(loss)})
    except Exception as error:  # safetensors has its own for a full disk
        part.unlink(missing_ok=True)
        raise OSError(error_number(error) or errno.EIO, str(error)) from error
    part.replace(file)


def _read_states(file: Path, model: LayerByLayer) -> tuple[int, dict[int, torch.Tensor], float, torch.Tensor]:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
    sums = {int(name.removeprefix("sums.")): value for name, value in tensors.items() if name != "states"}
    return int(metadata["next_layer"]), sums, float(metadata["loss"]), tensors["states"].to(model.device)


def unseen_experts(sums: dict[int, torch.Tensor]) -> dict[int, list[int]]:
    """By layer, the experts that no calibration token chose; layers without such are absent."""
    tokens = {index: value[..., FIELDS.index("tokens")].sum(dim=0) for index, value in sums.items()}
    unseen = {index: (count == 0).nonzero()[:, 0].tolist() for index, count in tokens.items()}
    return {index: experts for index, experts in unseen.items() if experts}


def check_calibration(measurement: Measurement, calibration: Calibration):
    """
    Raises:
        ValueError: there are experts that no token chose.
    """
    if unseen := unseen_experts(measurement.sums):
        layer, experts = max(unseen.items(), key=lambda item: len(item[1]))
        raise ValueError(
            f"The calibration text is too short: of its {len(calibration.ids)} tokens none chose {len(experts)} experts of layer "
            f"{layer} (such as {experts[0]}), and there are {sum(map(len, unseen.values()))} such experts in {len(unseen)} "
            "layers. Nothing can be said of them. Give more or other text (--calibration, --tokens), or say with "
            "`--unseen drop` that experts your text never uses may go first."
        )


# ---------------------------------------------------------------- writing


class Pruning:
    """Which tensors of a checkpoint stay, and what they are called then.

    Args:
        kept: by sparse layer the experts that stay, in their order.
        config: of the model as it is.
        num_layers: decoder layers and prediction modules that the new checkpoint has; further ones are left out.
    """

    def __init__(self, source: Source, kept: dict[int, list[int]], config: DeepseekConfig, num_layers: int):
        self.source, self.kept, self.num_layers = source, kept, num_layers
        self.num_experts = config.n_routed_experts
        self.new_number = {index: {old: new for new, old in enumerate(experts)} for index, experts in kept.items()}

    def change(self, name: str) -> Iterator[Tensor]:
        """What is written for a tensor: itself, a part of it, or nothing."""
        layer, match = _LAYER.match(name), _OF_EXPERTS.fullmatch(name)
        if layer and int(layer[1]) >= self.num_layers:
            return
        if match is None:
            yield self.source.tensor(name)
            return
        index = int(match["layer"])
        if match["expert"] is None:  # the router's rows and bias, or stacked experts
            if self.source.header(name)["shape"][0] != self.num_experts:
                raise ValueError(
                    f"{name} has shape {self.source.header(name)['shape']}; its first axis must be the "
                    f"{self.num_experts} experts of config.json. Use the config.json that belongs to the weights."
                )
            yield self.source.tensor(name, rows=self.kept[index])
        elif (new := self.new_number[index].get(int(match["expert"]))) is not None:
            yield self.source.tensor(name, f"{match['prefix']}experts.{new}.{match['rest']}")

    def tensors(self) -> Iterator[Tensor]:
        for name in self.source.shard_of:
            yield from self.change(name)

    def left_out(self) -> list[int]:
        """Layers of the files that the new checkpoint does without."""
        layers = {int(match[1]) for name in self.source.shard_of if (match := _LAYER.match(name))}
        return sorted(index for index in layers if index >= self.num_layers)


def pruned_config(config: dict, keep: int, num_mtp_modules: int) -> dict:
    """The config.json of the new checkpoint.

    Raises:
        ValueError: `quantization_config` names single experts, whose numbers change.
    """
    named = re.search(r"experts\.\d+", json.dumps(config.get("quantization_config", {})))
    if named:
        raise ValueError(
            f"`quantization_config` names {named[0]}, and experts get other numbers; name modules without numbers there."
        )
    new = {**config, "n_routed_experts": keep}
    if "num_local_experts" in config:  # another name of the same field
        new["num_local_experts"] = keep
    if getattr(resolve_config(config), "num_nextn_predict_layers", 0):
        new["num_nextn_predict_layers"] = num_mtp_modules
    resolve_config(new)
    return new


def sparse_layers(config: DeepseekConfig, num_mtp_modules: int) -> list[int]:
    """The layers with routed experts, prediction modules too."""
    layers = [index for index, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    if config.mtp_layer_type == "sparse":
        layers += [config.num_hidden_layers + k for k in range(num_mtp_modules)]
    return layers


def size_table(source: Source, pruning: Pruning, before: dict, after: dict) -> str:
    """Sizes before and after, as text."""
    rows = [("on disk, GB", source.total_bytes() / 1e9, sum(tensor.nbytes for tensor in pruning.tensors()) / 1e9)]
    parts = [_parts(config) for config in (before, after)]
    rows.append(("parameters, millions", *(part.total / 1e6 for part in parts)))
    rows.append(("active for a token, millions", *(part.active / 1e6 for part in parts)))
    rows += [(f"in memory at {8 * size} bits, GB", *(part.total * size / 1e9 for part in parts)) for size in (2, 1)]
    lines = [f"{'':30}{'before':>12}{'after':>12}{'after / before':>16}"]
    lines += [f"{name:30}{old:12.3f}{new:12.3f}{new / old:16.3f}" for name, old, new in rows]
    return "\n".join(lines)


def _parts(config: dict) -> Part:
    """All parameters; what is active for a token is the model's own, without prediction modules."""
    resolved = resolve_config(config)
    return sum(model_parts(resolved).values(), Part()) + mtp_part(resolved)._replace(active=0)


# ---------------------------------------------------------------- command line


def run(arguments: argparse.Namespace):
    """
    Raises:
        ValueError, OSError: what the arguments name cannot be pruned like this; the message says why.
    """
    if not arguments.dry_run:
        if arguments.output is None or not arguments.calibration:
            raise ValueError("--output and --calibration are missing; only a --dry-run does without.")
        refuse_existing(arguments.output)
    check_counts(arguments.tokens, arguments.context_tokens)
    check_device(arguments.device)
    folder = local_folder(arguments.model)
    config = read_config(folder)
    resolved = resolve_config(config)
    keep = experts_to_keep(arguments.keep, config)
    source = Source(folder)
    mtp_modules = min(resolved.num_nextn_predict_layers, _count_mtp(source, resolved.num_hidden_layers))
    new_config, num_layers = pruned_config(config, keep, mtp_modules), resolved.num_hidden_layers + mtp_modules
    any_kept = choose(torch.zeros(resolved.n_routed_experts), keep, resolved.n_group)
    sketch = Pruning(source, dict.fromkeys(sparse_layers(resolved, mtp_modules), any_kept), resolved, num_layers)
    sizes = size_table(source, sketch, config, new_config)
    if left_out := sketch.left_out():
        sizes += f"\nleft out: layers {left_out} of the files, which config.json does not count"
    if arguments.dry_run:
        print(sizes)
        return
    check_space(arguments.output, sum(tensor.nbytes for tensor in sketch.tensors()))

    tokenizer = load_tokenizer(arguments.tokenizer or folder)
    check_tokenizer(tokenizer, resolved)
    tokenizer.model_max_length = sys.maxsize  # texts are cut after they are encoded
    calibration = read_calibration(
        arguments.calibration, tokenizer, arguments.tokens, arguments.context_tokens, arguments.seed
    )
    device = arguments.device or str(torch.accelerator.current_accelerator() or "cpu")
    model = LayerByLayer(folder, None if arguments.dtype == "auto" else getattr(torch, arguments.dtype), device)
    what = {
        "model": digest(config, sorted((name, str(source.header(name))) for name in source.shard_of)),
        "calibration": digest(calibration.ids.tolist(), [row.stop for row in calibration.rows], calibration.names),
        "dtype": str(model.dtype),
        "keep": keep,
        "score": arguments.score,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    job = Job(arguments.output, what)
    print(sizes)  # all that was given is known to be right
    if job.goes_on:
        print(f"going on with {job.scratch}")
    with explain_interruption(job.scratch):
        measurement = measure(model, calibration, job.scratch)
        if arguments.unseen == "refuse":
            check_calibration(measurement, calibration)
        kept = {
            index: choose(score(sums, arguments.score), keep, resolved.n_group)
            for index, sums in measurement.sums.items()
        }
        pruning = Pruning(source, kept, resolved, num_layers)
        job.write_shards(source, pruning.change, "writing")
        record = pruning_record(arguments.score, calibration, measurement, kept)
        write_json(job.folder / "pruning.json", record)
        write_report(record, job.folder)
        what = f"{model_name(folder)} with {keep} of {resolved.n_routed_experts} routed experts, chosen by the score "
        what += f"`{arguments.score}` (`compress.prune`; pruning.json has all scores)."
        job.finish(folder, new_config, what)
    print(summary(record, arguments.model, arguments.output))


def _count_mtp(source: Source, num_hidden_layers: int) -> int:
    found = {int(match[1]) for name in source.shard_of if (match := re.search(r"\blayers\.(\d+)\.eh_proj\.", name))}
    return next(k for k in range(len(found) + 1) if num_hidden_layers + k not in found)


def pruning_record(score_name: str, calibration: Calibration, measurement: Measurement, kept: dict[int, list[int]]):
    """What pruning.json holds: everything that the choice was made of."""
    unigram = calibration.ids.bincount().float()
    unigram = unigram[unigram > 0] / unigram.sum()
    return {
        "score": score_name,
        "loss": round(measurement.loss, 4),
        "unigram_loss": round(float(-(unigram * unigram.log()).sum()), 4),
        "files": [
            {"name": name, "language": language, "tokens": int((calibration.source == number).sum())}
            for number, (name, language) in enumerate(zip(calibration.names, calibration.languages, strict=True))
        ],
        "fields": list(FIELDS),
        "layers": {
            str(index): {
                "kept": kept[index],
                "sums": [[[float(f"{x:.6g}") for x in e] for e in s] for s in sums.tolist()],
            }
            for index, sums in measurement.sums.items()
        },
    }


def summary(record: dict, model: str, output: Path) -> str:
    """What happened, and what comes next, in a few lines."""
    lost = [weight_lost(layer) for layer in record["layers"].values()]
    lines = [
        f"wrote {output}; on the calibration text {sum(lost) / len(lost):.1%} of the routing weight went to experts that"
    ]
    lines[0] += f" are gone ({max(lost):.1%} in the worst layer); {output / 'pruning.html'} shows more"
    if record["loss"] > record["unigram_loss"]:
        lines.append(
            f"warning: the model's loss on the calibration text is {record['loss']:.2f} nats a token, more than that of counting "
            f"tokens ({record['unigram_loss']:.2f}). Is this the model's own tokenizer, and text it knows?"
        )
    lines.append(
        f"next: python -m compress.compare {model} {output} --texts FILE ... --output COMPARISON, or, to recover,"
    )
    lines.append(
        f"python -m finetune.sft --model {output} --teacher {model} --data FILE ... --packing --merge --output RUN"
    )
    return "\n".join(lines)


def weight_lost(layer: dict, file: int | None = None) -> float:
    """The part of the routing weight that went to experts that are gone, in one layer of pruning.json."""
    sums = torch.tensor(layer["sums"], dtype=torch.float64)[..., FIELDS.index("weight")]  # [S, E]
    weight = sums.sum(dim=0) if file is None else sums[file]
    return float(1 - weight[layer["kept"]].sum() / weight.sum().clamp(min=1e-30))


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    run(arguments)
    return 0


if __name__ == "__main__":
    run_command(main)
