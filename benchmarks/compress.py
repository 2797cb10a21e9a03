"""Bits per byte against experts kept, for all scores and for random choice, calibrated on all texts and on one kind.

    python -m benchmarks.compress --corpus path/to/the/files --data runs/data

CORPUS holds the .jsonl.gz files that docs/checkpoint.md lists; documents that pretrain.data holds out (DATA) are left out of
the calibration. The checkpoint in this folder has 16 experts in 4 groups, of which 2 are visited, so 12 or 8 can stay. To see
14 and 10 as well, the router's groups are lifted too (`n_group` 1): a variant with its own figure at 16.

Writes benchmarks/results/compress.json and .png.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from transformers.utils import logging

from benchmarks.common import RESULTS, ROOT, write_results
from common.loading import load_config, load_model, load_tokenizer
from common.machine import describe_machine
from compress.calibration import read_calibration
from compress.layers import LayerByLayer
from compress.prune import Measurement, Pruning, measure, pruned_config, unseen_experts
from compress.rewrite import Job, Source
from compress.scores import SCORES, choose, score
from pretrain.data import HeldOut, load_held_out
from pretrain.evaluate import bits_per_byte, held_out_nll
from tokenization.documents import is_held_out, read_documents

LANGUAGES = ("en", "zh")
ONE_DOMAIN = "en_python_docs"
RANDOM_SEEDS = 3
COUNTS = {"groups of 4 experts": (4, 2, (12, 8)), "no groups": (1, 1, (14, 12, 10, 8))}


def training_documents(corpus: Path, folder: Path) -> list[Path]:
    """The corpus without what is held out, a .jsonl a file."""
    paths = []
    for file in sorted(corpus.glob("*.jsonl.gz")):
        paths.append(folder / file.name.removesuffix(".gz"))
        documents = (text for text in read_documents(file) if not is_held_out(text, 0.01))
        paths[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return paths


def with_groups(folder: Path, n_group: int, topk_group: int) -> Path:
    """The checkpoint of this repository with other groups of experts."""
    folder.mkdir()
    config = json.loads((ROOT / "config.json").read_text()) | {"n_group": n_group, "topk_group": topk_group}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(ROOT / "model.safetensors")
    return folder


def spread(text: HeldOut, every: int, tokenizer) -> HeldOut:
    """Each `every`-th window, from all over the text; of byte-level tokens each character stands for a byte."""
    windows = text.windows[::every]
    if (len(text.windows) - 1) % every == 0:
        windows = windows[:-1]  # the last one has filling
    special = set(tokenizer.all_special_ids)
    targets = [token for token in windows[:, 1:].flatten().tolist() if token not in special]
    num_bytes = sum(map(len, tokenizer.convert_ids_to_tokens(targets)))
    return HeldOut(windows, num_targets=windows[:, 1:].numel(), num_bytes=num_bytes)


def evaluate(folder: Path, held_out: dict, bos: int) -> dict[str, float]:
    model = load_model(folder, dtype=torch.float32).eval()
    nll = {name: held_out_nll(model, text, bos, 8, torch.device("cpu")) for name, text in held_out.items()}
    return {name: round(bits_per_byte(nll[name], text.num_bytes), 4) for name, text in held_out.items()}


def pruned(folder: Path, output: Path, kept: dict[int, list[int]], keep: int) -> Path:
    config = json.loads((folder / "config.json").read_text())
    source, resolved = Source(folder), load_config(folder)
    job = Job(output, {})
    num_layers = resolved.num_hidden_layers + resolved.num_nextn_predict_layers
    job.write_shards(source, Pruning(source, kept, resolved, num_layers).change, "writing")
    job.finish(folder, pruned_config(config, keep, resolved.num_nextn_predict_layers))
    return output


def choices(measurement: Measurement, one: int, keep: int, groups: int) -> dict[str, dict[int, list[int]]]:
    """What stays, by name of the score and of the calibration text."""
    found = {}
    for name in SCORES:
        scopes = {"all": measurement.sums, ONE_DOMAIN: {i: s[one : one + 1] for i, s in measurement.sums.items()}}
        for scope, sums in scopes.items():
            found[f"{name}, {scope}"] = {i: choose(score(s, name), keep, groups) for i, s in sums.items()}
    for seed in range(RANDOM_SEEDS):
        generator = torch.Generator().manual_seed(seed)
        found[f"random {seed}"] = {
            i: choose(torch.rand(s.shape[1], generator=generator), keep, groups) for i, s in measurement.sums.items()
        }
    return found


def draw(results: dict, path: Path):
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharex=True, layout="constrained")
    for row, (groups, variants) in zip(axes, results.items(), strict=True):
        for axis, language in zip(row, LANGUAGES, strict=True):
            names = {
                name for points in variants["pruned"].values() for name in points if not name.startswith("random")
            }
            for name in sorted(names):
                points = [(16, variants["whole"])] + [(int(n), p[name]) for n, p in variants["pruned"].items()]
                x, y = zip(*((100 * n / 16, bits[language]) for n, bits in points), strict=True)
                axis.plot(x, y, marker=".", label=name, linestyle="-" if name.endswith("all") else ":")
            values = [
                [p[f"random {seed}"][language] for seed in range(RANDOM_SEEDS)] for p in variants["pruned"].values()
            ]
            x = [100 * int(n) / 16 for n in variants["pruned"]]
            axis.fill_between(
                x, [min(v) for v in values], [max(v) for v in values], color="grey", alpha=0.3, label="random"
            )
            axis.set_title(f"{language}, {groups}")
            axis.set_ylabel("bits per byte")
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("experts kept, %")
    axes[0][0].invert_xaxis()
    axes[0][0].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with the corpus, .jsonl.gz files")
    parser.add_argument("--data", type=Path, required=True, help="folder that pretrain.data has written")
    parser.add_argument("--tokens", type=int, default=57344, help="calibration tokens (%(default)s)")
    parser.add_argument("--every", type=int, default=4, help="each so many-th held-out window is read (%(default)s)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(ROOT)
    held_out = {
        name: spread(text, arguments.every, tokenizer) for name, text in load_held_out(arguments.data, 512).items()
    }
    tokenizer.model_max_length = 2**31
    results = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        paths = training_documents(arguments.corpus, work)
        calibration = read_calibration(paths, tokenizer, arguments.tokens, 512)
        one = calibration.names.index(ONE_DOMAIN)
        for title, (n_group, topk_group, counts) in COUNTS.items():
            folder = with_groups(work / f"groups{n_group}", n_group, topk_group)
            measurement = measure(LayerByLayer(folder, torch.float32), calibration)
            alone = {i: s[one : one + 1] for i, s in measurement.sums.items()}
            results[title] = {
                "whole": evaluate(folder, held_out, tokenizer.bos_token_id),
                "unseen_by_one_domain": sum(map(len, unseen_experts(alone).values())),
                "pruned": {},
            }
            for keep in counts:
                for key, kept in choices(measurement, one, keep, n_group).items():
                    output = pruned(folder, work / f"{n_group}-{keep}-{key}".replace(" ", ""), kept, keep)
                    bits = evaluate(output, held_out, tokenizer.bos_token_id)
                    results[title]["pruned"].setdefault(str(keep), {})[key] = bits
                    print(title, keep, key, bits, flush=True)
    draw(results, RESULTS / "compress.png")
    command = (
        f"python -m benchmarks.compress --corpus CORPUS --data DATA --tokens {arguments.tokens} "
        f"--every {arguments.every}"
    )
    write_results("compress", {"machine": describe_machine(), "command": command, "results": results})


if __name__ == "__main__":
    main()
