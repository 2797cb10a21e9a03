"""What pruning, recovery and quantisation cost the checkpoint of this folder: bits per byte in both languages.

    python -m benchmarks.compress --corpus path/to/the/files --data runs/data --work runs/compress
    python -m benchmarks.compress ... --llm-compressor path/to/its/environment/bin/python      # int4 too
    python -m benchmarks.compress ... --known                                                  # writes what WORK has already

CORPUS holds the .jsonl.gz files that docs/checkpoint.md lists; documents that pretrain.data holds out (DATA) are left out of
calibration and recovery. Three parts, each figure kept in WORK as it is found, so that the same command goes on:

    scores     experts kept against bits per byte, for all scores and for random choice, calibrated on all files and on one
    recovery   some of these before and after distillation from the original (finetune.sft --teacher), and without a teacher
    plane      pruned x quantised, before and after recovery: bytes against bits per byte, and the best front

The checkpoint has 16 experts in 4 groups, of which 2 are visited, so 12 or 8 can stay. To see 14 and 10 as well the router's
groups are lifted too (`n_group` 1), a variant with its own figure at 16. The prediction module is left out everywhere.

Writes runs/benchmarks/compress.json and .png.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from transformers.utils import logging

from benchmarks.common import RESULTS, ROOT, write_results
from common.command import one_line_errors, run_command
from common.loading import load_config, load_model, load_tokenizer
from common.machine import describe_machine
from compress import quantise
from compress.calibration import read_calibration
from compress.compare import best_front
from compress.layers import LayerByLayer
from compress.prune import Measurement, Pruning, measure, pruned_config
from compress.rewrite import Job, Source
from compress.scores import SCORES, choose, score
from finetune import sft
from finetune.config import SFTOptions, make_options
from pretrain.data import HeldOut, load_held_out
from pretrain.evaluate import bits_per_byte, held_out_nll
from tokenization.documents import is_held_out, read_documents

PARTS = ("scores", "recovery", "plane")
LANGUAGES = {"en": "English", "zh": "Chinese"}
ONE_DOMAIN = "en_python_docs"
RANDOM_SEEDS = 3
EXPERTS = 16
GROUPS = {"groups of 4": (4, 2, (12, 8)), "no groups": (1, 1, (14, 12, 10, 8))}
# Of the variant without groups: experts kept, how they were chosen, whether there is a teacher, and steps of 2,048 tokens.
STEPS = 16
RECOVERIES = [
    (8, "reap, all", True, STEPS),
    (12, "reap, all", True, STEPS),
    (8, f"reap, {ONE_DOMAIN}", True, STEPS),
    (8, "reap, all", False, STEPS),
    (8, "reap, all", True, 64),
]
RECOVERY = {"batch_size": 4, "max_tokens": 512, "learning_rate": 2e-3, "rank": 8, "alpha": 16}
FORMATS = ("fp8", "int4")
PLANE = (12, 8)  # experts kept
COLOURS = dict(zip(("bf16", *FORMATS), ("C0", "C1", "C3"), strict=True))


class Figures:
    """Figures found so far, kept in a file."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, dict] = json.loads(path.read_text()) if path.is_file() else {}

    def find(self, name: str, make: Callable[[], dict]) -> dict:
        """The figures of `name`, made only if they are not known."""
        if name not in self.found:
            self.found[name] = make()
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.found, indent=1))
            os.replace(part, self.path)
            print(name, self.found[name], flush=True)
        return self.found[name]


class Bench:
    """What the parts share: texts, held-out text, and folders of checkpoints in WORK that are made when they are asked for."""

    def __init__(self, arguments: argparse.Namespace):
        self.work: Path = arguments.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.figures = Figures(self.work / "figures.json")
        self.llm_compressor, self.known = arguments.llm_compressor, arguments.known
        if self.known:
            return
        tokenizer = load_tokenizer(ROOT)
        texts = load_held_out(arguments.data, 512)
        self.held_out = {name: spread(text, arguments.every, tokenizer) for name, text in texts.items()}
        self.bos = tokenizer.bos_token_id
        tokenizer.model_max_length = sys.maxsize
        self.files = training_documents(arguments.corpus, self.work / "texts")
        self.calibration = read_calibration(self.files, tokenizer, arguments.tokens, 512)
        self.one = self.calibration.names.index(ONE_DOMAIN)
        self._measured: dict[str, Measurement] = {}

    def whole(self, groups: str) -> Path:
        """The checkpoint with these groups and all experts, without the prediction module."""
        n_group, topk_group, _ = GROUPS[groups]
        linked = self.work / f"{n_group}-linked"
        if not linked.exists():
            linked.mkdir()
            config = json.loads((ROOT / "config.json").read_text())
            config |= {"n_group": n_group, "topk_group": topk_group, "num_nextn_predict_layers": 0}
            (linked / "config.json").write_text(json.dumps(config))
            for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                (linked / name).symlink_to(ROOT / name)
        return self._written(linked, f"{n_group}-{EXPERTS}", {}, EXPERTS)

    def pruned(self, groups: str, keep: int, choice: str) -> Path:
        """The checkpoint with `keep` experts."""
        if keep == EXPERTS:
            return self.whole(groups)
        name = f"{GROUPS[groups][0]}-{keep}-{choice.replace(', ', '-').replace(' ', '-')}"
        if (self.work / name).exists():
            return self.work / name
        return self._written(self.whole(groups), name, self._choices(groups, keep)[choice], keep)

    def recovered(self, keep: int, choice: str, with_teacher: bool, steps: int) -> Path:
        """The checkpoint without groups after distillation, merged."""
        pruned = self.pruned("no groups", keep, choice)
        run = self.work / f"{pruned.name}-{'distilled' if with_teacher else 'trained'}-{steps}"
        if (run / "merged").exists():
            return run / "merged"
        shutil.rmtree(run, ignore_errors=True)
        held_out = self.work / "recovery_held_out.jsonl"
        data = self.work / "recovery.jsonl"
        if not data.exists():
            write_sample(self.files, data, held_out, documents=16)
        values = {"model": str(pruned), "data": [str(data)], "eval_data": [str(held_out)], "output": str(run)}
        values |= {"steps": steps, "eval_steps": steps, "packing": True, "merge": True, **RECOVERY}
        values |= {"teacher": str(self.whole("groups of 4"))} if with_teacher else {}
        sft.run(make_options(SFTOptions, values | {"track": ["none"], "preview": False, "cpu": True}))
        return run / "merged"

    def quantised(self, folder: Path, form: str) -> Path:
        """A checkpoint in another form."""
        if form == "bf16":
            return folder
        output = self.work / f"{folder.parent.name if folder.name == 'merged' else folder.name}-{form}"
        if not output.exists():
            arguments = ["--model", str(folder), "--output", str(output), "--format", form]
            if form == "fp8":
                code = quantise.main(arguments)
            else:
                arguments += ["--tokens", str(512 * len(self.files)), "--calibration", *map(str, self.files)]
                command = [str(self.llm_compressor), "-m", "compress.quantise", *arguments]
                code = subprocess.run(command, cwd=ROOT).returncode
            if code:
                raise ValueError(f"{folder} could not be quantised to {form}; the reason is above")
        return output

    def bits(self, name: str, make: Callable[[], Path]) -> dict[str, float] | None:
        """Bits per byte by language, and bytes of the weights; of folders with the same weights once. None if only what is
        known is asked for, and this is not."""
        if self.known and name not in self.figures.found:
            return None

        def evaluate() -> dict:
            folder = make()
            return self.figures.find(f"weights {_weights_digest(folder)}", lambda: read(folder))

        def read(folder: Path) -> dict:
            model = load_model(folder, dtype=torch.float32).eval()
            device = torch.device("cpu")
            nll = {lang: held_out_nll(model, text, self.bos, 8, device) for lang, text in self.held_out.items()}
            bits = {lang: round(bits_per_byte(nll[lang], text.num_bytes), 4) for lang, text in self.held_out.items()}
            return {**bits, "bytes": Source(folder).total_bytes()}

        return self.figures.find(name, evaluate)

    def measured(self, groups: str) -> Measurement:
        """What the experts do to the calibration text."""
        if groups not in self._measured:
            self._measured[groups] = measure(LayerByLayer(self.whole(groups), torch.float32), self.calibration)
        return self._measured[groups]

    def _choices(self, groups: str, keep: int) -> dict[str, dict[int, list[int]]]:
        """What stays, by name of the score and of the calibration text."""
        measured, n_group = self.measured(groups).sums, GROUPS[groups][0]
        found = {}
        for name in SCORES:
            scopes = {"all": measured, ONE_DOMAIN: {i: s[self.one : self.one + 1] for i, s in measured.items()}}
            for scope, sums in scopes.items():
                found[f"{name}, {scope}"] = {i: choose(score(s, name), keep, n_group) for i, s in sums.items()}
        for seed in range(RANDOM_SEEDS):
            generator = torch.Generator().manual_seed(seed)
            found[f"random {seed}"] = {
                i: choose(torch.rand(s.shape[1], generator=generator), keep, n_group) for i, s in measured.items()
            }
        return found

    def _written(self, folder: Path, name: str, kept: dict[int, list[int]], keep: int) -> Path:
        output = self.work / name
        if not output.exists():
            config, source, resolved = (
                json.loads((folder / "config.json").read_text()),
                Source(folder),
                load_config(folder),
            )
            sparse = [i for i, kind in enumerate(resolved.mlp_layer_types) if kind == "sparse"]
            kept = kept or {i: list(range(keep)) for i in sparse}
            job = Job(output, {"kept": {str(i): experts for i, experts in kept.items()}})
            job.write_shards(source, Pruning(source, kept, resolved, resolved.num_hidden_layers).change, "writing")
            job.finish(folder, pruned_config(config, keep, 0), "A pruned model of benchmarks.compress.")
        return output


def _weights_digest(folder: Path) -> str:
    """Of the weights and the groups of experts."""
    found = hashlib.sha256(json.dumps(load_config(folder).n_group).encode())
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


# ---------------------------------------------------------------- texts


def training_documents(corpus: Path, folder: Path) -> list[Path]:
    """The corpus without what is held out, a .jsonl a file."""
    folder.mkdir(exist_ok=True)
    paths = []
    for file in sorted(corpus.glob("*.jsonl.gz")):
        paths.append(folder / file.name.removesuffix(".gz"))
        if not paths[-1].exists():
            documents = (text for text in read_documents(file) if not is_held_out(text, 0.01))
            part = paths[-1].with_suffix(".part")
            part.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
            os.replace(part, paths[-1])
    return paths


def write_sample(files: list[Path], train: Path, held_out: Path, documents: int, characters: int = 6000):
    """The beginnings of so many documents of each file, from all over it; the last of each third file is held out."""
    parts: dict[Path, list[str]] = {held_out: [], train: []}
    for number, file in enumerate(files):
        lines = file.read_text(encoding="utf-8").splitlines()
        lines = lines[:: max(1, len(lines) // documents)][:documents]
        texts = [json.dumps({"text": json.loads(line)["text"][:characters]}) for line in lines]
        parts[train] += texts[:-1]
        if number % 3 == 0:
            parts[held_out].append(json.dumps({"text": json.loads(lines[-1])["text"][:1000]}))
    for path, texts in parts.items():
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def spread(text: HeldOut, every: int, tokenizer) -> HeldOut:
    """Each `every`-th window, from all over the text; of byte-level tokens each character stands for a byte."""
    windows = text.windows[::every]
    if (len(text.windows) - 1) % every == 0:
        windows = windows[:-1]  # the last one has filling
    special = set(tokenizer.all_special_ids)
    targets = [token for token in windows[:, 1:].flatten().tolist() if token not in special]
    num_bytes = sum(map(len, tokenizer.convert_ids_to_tokens(targets)))
    return HeldOut(windows, num_targets=windows[:, 1:].numel(), num_bytes=num_bytes)


# ---------------------------------------------------------------- parts


def find_scores(bench: Bench) -> dict:
    """-> by groups: the whole model, and by experts kept and choice the pruned ones"""
    found = {}
    for groups, (_, _, counts) in GROUPS.items():
        whole = bench.bits(f"{groups}/{EXPERTS}", lambda groups=groups: bench.whole(groups))

        names = [f"{name}, {scope}" for name in SCORES for scope in ("all", ONE_DOMAIN)]
        names += [f"random {seed}" for seed in range(RANDOM_SEEDS)]
        entry = {"whole": whole, "pruned": {}}
        for keep in counts:
            points = {
                name: bench.bits(f"{groups}/{keep}/{name}", lambda k=keep, n=name, g=groups: bench.pruned(g, k, n))
                for name in names
            }
            if points := {name: point for name, point in points.items() if point is not None}:
                entry["pruned"][str(keep)] = points
        found[groups] = entry
    return found


def find_recoveries(bench: Bench) -> list[dict]:
    """-> before and after, of each of `RECOVERIES`"""
    found = []
    for keep, choice, with_teacher, steps in RECOVERIES:
        name = f"no groups/{keep}/{choice}"
        before = bench.bits(name, lambda k=keep, c=choice: bench.pruned("no groups", k, c))
        after = bench.bits(
            f"{name}/{'distilled' if with_teacher else 'trained'} {steps}",
            lambda k=keep, c=choice, t=with_teacher, n=steps: bench.recovered(k, c, t, n),
        )
        if before is not None and after is not None:
            entry = {"kept": keep, "choice": choice, "teacher": with_teacher, "steps": steps}
            found.append(entry | {"before": before, "after": after})
    return found


def find_plane(bench: Bench) -> list[dict]:
    """-> bytes and bits per byte of pruned and quantised checkpoints; the first is the original"""
    found = []
    formats = ("bf16", *FORMATS) if bench.llm_compressor else ("bf16", "fp8")
    for keep in (EXPERTS, *PLANE):
        for recovered in (False, True) if keep < EXPERTS else (False,):
            for form in formats:

                def make(keep=keep, recovered=recovered, form=form) -> Path:
                    if keep == EXPERTS:
                        folder = bench.whole("groups of 4")
                    else:
                        folder = bench.recovered(keep, "reap, all", True, STEPS) if recovered else None
                        folder = folder or bench.pruned("no groups", keep, "reap, all")
                    return bench.quantised(folder, form)

                name = f"plane/{keep}/{'recovered' if recovered else 'pruned'}/{form}"
                if (bits := bench.bits(name, make)) is not None:
                    found.append({"kept": keep, "recovered": recovered, "format": form, **bits})
    return found


# ---------------------------------------------------------------- drawing


def draw(results: dict, path: Path):
    """A column a language: scores by groups, recoveries, and the plane; a row a part that was run."""
    rows = [(_draw_scores, groups, results["scores"][groups]) for groups in results.get("scores", {})]
    rows += [(_draw_recoveries, None, results["recovery"])] if results.get("recovery") else []
    rows += [(_draw_plane, None, results["plane"])] if results.get("plane") else []
    figure, axes = plt.subplots(len(rows), 2, figsize=(13, 4.4 * len(rows)), squeeze=False, layout="constrained")
    for row, (draw_one, title, part) in zip(axes, rows, strict=True):
        for axis, language in zip(row, LANGUAGES, strict=True):
            draw_one(axis, part, language)
            axis.set_title(", ".join(filter(None, (LANGUAGES[language], title))))
            axis.set_ylabel("" if draw_one is _draw_recoveries else "bits per byte, held out")
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_scores(axis, part: dict, language: str):
    points = {EXPERTS: None} | {int(keep): found for keep, found in part["pruned"].items()}

    def line(name: str) -> tuple[list[float], list[float]]:
        found = {keep: part["whole"] if p is None else p[name] for keep, p in points.items() if p is None or name in p}
        return [100 * keep / EXPERTS for keep in found], [bits[language] for bits in found.values()]

    for number, name in enumerate(SCORES):
        for scope, style in (("all", "-"), (ONE_DOMAIN, ":")):
            axis.plot(*line(f"{name}, {scope}"), style, marker=".", color=f"C{number}", label=f"{name}, {scope}")
    draws = [line(f"random {seed}") for seed in range(RANDOM_SEEDS)]
    low, high = ([pick(values) for values in zip(*(y for _, y in draws), strict=False)] for pick in (min, max))
    label = f"random, {RANDOM_SEEDS} draws"
    axis.fill_between(draws[-1][0], low, high, color="grey", alpha=0.3, label=label)
    axis.set_xlabel("experts kept, %")
    axis.invert_xaxis()
    if language == "en":
        axis.legend(fontsize="x-small", ncols=2)


def _draw_recoveries(axis, part: list[dict], language: str):
    for place, entry in enumerate(part):
        before, after = entry["before"][language], entry["after"][language]
        axis.annotate("", (after, place), (before, place), arrowprops={"arrowstyle": "->", "color": "C0"})
        axis.plot(before, place, "x", color="C3", label="before" if place == 0 else None)
        axis.plot(after, place, "o", color="C2", label="after" if place == 0 else None)
    names = [f"{e['kept']}: {e['choice']}{'' if e['teacher'] else ', no teacher'}, {e['steps']} steps" for e in part]
    axis.set_yticks(range(len(part)), names, fontsize="small")
    axis.invert_yaxis()
    axis.set_xlabel("bits per byte, held out")
    axis.legend()


def _draw_plane(axis, part: list[dict], language: str):
    points = [(entry["bytes"] / 1e6, entry[language]) for entry in part]
    for entry, point in zip(part, points, strict=True):
        marker = "o" if entry["recovered"] or entry["kept"] == EXPERTS else "x"
        axis.plot(*point, marker, color=COLOURS[entry["format"]])
        axis.annotate(str(entry["kept"]), point, textcoords="offset points", xytext=(4, 3), fontsize="x-small")
    axis.plot(*zip(*best_front(points), strict=True), color="black", linewidth=1, label="best front")
    for form in dict.fromkeys(entry["format"] for entry in part):
        axis.plot([], [], "s", color=COLOURS[form], label=form)
    axis.plot([], [], "ko", label="whole or recovered")
    axis.plot([], [], "kx", label="pruned only")
    axis.set_xlabel("weights, MB; numbers: experts kept of 16")
    axis.legend(fontsize="small")


# ---------------------------------------------------------------- command line


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with the corpus, .jsonl.gz files")
    parser.add_argument("--data", type=Path, required=True, help="folder that pretrain.data has written")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "compress", help="folder for checkpoints and figures"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (all)")
    parser.add_argument(
        "--llm-compressor",
        type=Path,
        help="Python of an environment with llmcompressor, for int4, which is read here by compressed-tensors",
    )
    parser.add_argument("--known", action="store_true", help="run nothing: write the figures that WORK has")
    parser.add_argument("--tokens", type=int, default=28672, help="calibration tokens (%(default)s)")
    parser.add_argument("--every", type=int, default=8, help="each so many-th held-out window is read (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.llm_compressor and not arguments.known and not find_spec("compressed_tensors"):
        raise ValueError(
            "--llm-compressor is given, and int4 is read here by compressed-tensors: pip install compressed-tensors"
        )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = Bench(arguments)
    find = {"scores": find_scores, "recovery": find_recoveries, "plane": find_plane}
    results = {part: find[part](bench) for part in PARTS if part in arguments.only}
    RESULTS.mkdir(parents=True, exist_ok=True)
    draw(results, RESULTS / "compress.png")
    command = f"python -m benchmarks.compress --corpus CORPUS --data DATA --tokens {arguments.tokens}"
    command += f" --every {arguments.every}"
    command += " --llm-compressor PYTHON" if arguments.llm_compressor else ""
    command += " --known" if arguments.known else ""  # some figures may be missing
    head = {"machine": describe_machine(), "command": command, "recovery_options": RECOVERY}
    write_results("compress", head | {"results": results})
    return 0


if __name__ == "__main__":
    run_command(main)
