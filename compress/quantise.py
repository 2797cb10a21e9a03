"""Writes a checkpoint with fewer bits: DeepSeek's own FP8, or int8 and int4 through llm-compressor (compress/integers.py).

    python -m compress.quantise --model path/to/model --output runs/fp8 --format fp8
    python -m compress.quantise --model path/to/model --output runs/int4 --format int4 --calibration en.jsonl zh.jsonl

FP8 has blocks of 128 x 128 numbers in E4M3, each with a float32 scale:

    scale = max |W| of the block / 448,   stored = round(W / scale),   W is read back as stored * scale

As in the published files, embedding, output head, routers, norms, `eh_proj` and the indexer's `weights_proj` stay as they
are. One matrix is in memory at a time. The same command goes on after an interruption. int8 and int4 have the whole model in
memory, need calibration text, and begin anew.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra

FORMATS = ("fp8", "int8", "int4")
METHODS = ("gptq", "awq")  # of int8 and int4


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m compress.quantise", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="checkpoint: a folder, or a name on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--format", choices=FORMATS, default="fp8", help="what to write (%(default)s)")
    parser.add_argument("--method", choices=METHODS, help="of int8 and int4 (gptq)")
    parser.add_argument(
        "--calibration", nargs="+", type=Path, metavar="FILE", help="for int8 and int4: files as for compress.prune"
    )
    parser.add_argument("--tokens", type=int, default=65536, help="calibration tokens of all files (%(default)s)")
    parser.add_argument("--context-tokens", type=int, default=512, help="longest row, in tokens (%(default)s)")
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("train"):
    import torch
    import torch.nn.functional as F
    from safetensors import safe_open

    from common.card import model_name
    from common.hub import local_folder
    from common.loading import load_tokenizer
    from common.remote_code import quant_method, read_config
    from common.rewrite import refuse_existing, resolve_config
    from compress.calibration import Calibration, check_tokenizer, read_calibration
    from compress.integers import write_integers
    from compress.rewrite import Job, Source, Tensor, check_space, digest, explain_interruption

BLOCK = 128
LARGEST = 448.0  # of E4M3
# What DeepSeek's files have in FP8: the projections of attention, the indexer and every MLP.
_QUANTISED = re.compile(
    r"(?:model\.)?layers\.\d+\.(?:self_attn\.(?:(?:q|k|v|o|q_a|q_b|kv_b)_proj|kv_a_proj_with_mqa|indexer\.(?:wq_b|wk))"
    r"|mlp\.(?:(?:experts\.\d+|shared_experts)\.)?(?:gate|up|down)_proj)\.weight"
)
# Linear modules that stay as they are, where the model has them: engines need their names.
_KEPT = re.compile(
    r"((?:model\.)?layers\.\d+\.(?:mlp\.gate|eh_proj|self_attn\.indexer\.weights_proj)|lm_head)\.weight"
)
_FLOATS = ("F64", "F32", "F16", "BF16")


def quantise_blocks(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] -> E4M3 of the same shape and float32 scales [ceil(rows / 128), ceil(columns / 128)].

    Blocks at the edges are cut off. A block of zeros has the scale 1.

    Raises:
        ValueError: there are numbers that are not finite.
    """
    rows, columns = matrix.shape
    padded = F.pad(matrix.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [I, 128, J, 128]
    largest = blocks.abs().amax(dim=(1, 3))  # [I, J]
    if not largest.isfinite().all():
        raise ValueError("it holds numbers that are not finite")
    # what is tiny would have a scale that float32 rounds to 0
    scales = (largest / LARGEST).masked_fill(largest / LARGEST < torch.finfo(torch.float32).tiny, 1.0)
    scaled = (blocks / scales[:, None, :, None]).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn).flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous(), scales


class FP8Writer:
    """What becomes of the tensors of a checkpoint."""

    def __init__(self, source: Source):
        self.source = source
        self._last: tuple[str, tuple[torch.Tensor, torch.Tensor]] | None = None

    def is_quantised(self, name: str) -> bool:
        header = self.source.header(name)
        return _QUANTISED.fullmatch(name) is not None and header["dtype"] in _FLOATS and len(header["shape"]) == 2

    def change(self, name: str) -> Iterator[Tensor]:
        if not self.is_quantised(name):
            yield self.source.tensor(name)
            return
        rows, columns = self.source.header(name)["shape"]
        yield Tensor(name, "F8_E4M3", (rows, columns), lambda: self._bytes(name, 0))
        yield Tensor(
            f"{name}_scale_inv", "F32", (-(-rows // BLOCK), -(-columns // BLOCK)), lambda: self._bytes(name, 1)
        )

    def _bytes(self, name: str, part: int) -> Iterator[memoryview]:
        """Of the FP8 numbers (part 0) or of the scales (1); the scales follow the numbers at once."""
        if self._last is None or self._last[0] != name:
            with safe_open(self.source.folder / self.source.shard_of[name], framework="pt") as file:
                matrix = file.get_tensor(name)
            try:
                self._last = (name, quantise_blocks(matrix))
            except ValueError as error:
                raise ValueError(
                    f"{name} in {self.source.folder} cannot be quantised: {error}; download it again."
                ) from None
        yield memoryview(self._last[1][part].view(torch.uint8).numpy()).cast("B")


def fp8_config(config: dict, source: Source) -> dict:
    """The config.json of the new checkpoint."""
    kept = sorted(match[1] for name in source.shard_of if (match := _KEPT.fullmatch(name)))
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }
    return {**config, "quantization_config": quantization}


def run(arguments: argparse.Namespace):
    """
    Raises:
        ValueError, OSError: the checkpoint cannot be quantised; the message says why.
    """
    folder = local_folder(arguments.model)
    config = read_config(folder)
    if (method := quant_method(config)) is not None:
        raise ValueError(f"{folder} is quantised already, by {method!r}; name the checkpoint it was made from.")
    refuse_existing(arguments.output)
    source = Source(folder)
    if arguments.format == "fp8":
        if arguments.calibration or arguments.method:
            raise ValueError("--calibration and --method are for int8 and int4; FP8 needs neither, leave them out.")
        write_fp8(source, config, arguments.output)
    else:
        write_calibrated(source, config, arguments)
    written = Source(arguments.output).total_bytes()
    print(f"wrote {arguments.output}: {written / 1e9:.3f} GB, {written / source.total_bytes():.3f} of what it was")
    print(
        f"next: python -m compress.compare {arguments.model} {arguments.output} --texts FILE ... --output COMPARISON"
    )


def write_fp8(source: Source, config: dict, output: Path):
    """
    Raises:
        ValueError, OSError: as `run`.
    """
    folder, writer = source.folder, FP8Writer(source)
    if stacked := [name for name in source.shard_of if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        raise ValueError(
            f"{stacked[0]} holds the experts of a layer in one tensor; load the model here and save it again, which writes one "
            "matrix an expert as DeepSeek does."
        )
    if not any(map(writer.is_quantised, source.shard_of)):
        raise ValueError(f"{folder} has no matrices that FP8 is for; is it an adapter, or another model?")
    check_space(output, sum(tensor.nbytes for name in source.shard_of for tensor in writer.change(name)))
    output.parent.mkdir(parents=True, exist_ok=True)
    job = Job(output, {"model": _digest(source, config), "format": "fp8"})
    with explain_interruption(job.scratch):
        job.write_shards(source, writer.change, "quantising")
        job.finish(
            folder,
            fp8_config(config, source),
            f"{model_name(folder)} in FP8, blocks of 128 x 128 (`compress.quantise`).",
        )


def write_calibrated(source: Source, config: dict, arguments: argparse.Namespace):
    """int8 or int4.

    Raises:
        ValueError, OSError: as `run`.
    """
    if not arguments.calibration:
        raise ValueError(
            f"--calibration is missing; --format {arguments.format} rounds by what goes through the matrices."
        )
    calibration = _read_calibration(source.folder, config, arguments)
    check_space(arguments.output, source.total_bytes())  # an upper bound
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    what = {"model": _digest(source, config), "format": arguments.format, "method": arguments.method or METHODS[0]}
    job = Job(arguments.output, what | {"calibration": digest(calibration.ids.tolist())})
    with explain_interruption(job.scratch, goes_on=False):
        for left in job.folder.iterdir():  # of a run that was interrupted
            left.unlink()
        write_integers(source.folder, job.folder, what["format"], what["method"], calibration)
        how = f"{model_name(source.folder)} in {what['format']} by {what['method'].upper()} (`compress.quantise`)."
        job.finish(source.folder, read_config(job.folder), how)


def _read_calibration(folder: Path, config: dict, arguments: argparse.Namespace) -> Calibration:
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, resolve_config(config))
    tokenizer.model_max_length = sys.maxsize  # texts are cut after they are encoded
    return read_calibration(arguments.calibration, tokenizer, arguments.tokens, arguments.context_tokens)


def _digest(source: Source, config: dict) -> str:
    return digest(config, sorted((name, str(source.header(name))) for name in source.shard_of))


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    run(arguments)
    return 0


if __name__ == "__main__":
    run_command(main)
