"""Writes a checkpoint's matrices in DeepSeek's own FP8: blocks of 128 x 128 numbers in E4M3, each with a float32 scale.

    python -m compress.quantise --model path/to/model --output runs/fp8 --format fp8

    scale = max |W| of the block / 448,   stored = round(W / scale),   W is read back as stored * scale

As in the published files, embedding, output head, routers, norms, `eh_proj` and the indexer's `weights_proj` stay as they
are. One matrix is in memory at a time. The same command goes on after an interruption.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from common.extras import extra

with extra("train"):
    import torch
    import torch.nn.functional as F
    from safetensors import safe_open

    from compress.rewrite import Job, Source, Tensor, check_space, digest, explain_interruption, local_folder
    from tools.add_remote_code import read_config
    from tools.convert import refuse_existing

BLOCK = 128
LARGEST = 448.0  # of E4M3
FORMATS = ("fp8",)
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m compress.quantise", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="checkpoint: a folder, or a name on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--format", choices=FORMATS, default="fp8", help="what to write (%(default)s)")
    return parser


def run(arguments: argparse.Namespace):
    """
    Raises:
        ValueError, OSError: the checkpoint cannot be quantised; the message says why.
    """
    folder = local_folder(arguments.model)
    config = read_config(folder)
    if (quantization := config.get("quantization_config")) is not None:
        raise ValueError(
            f"{folder} is quantised already, by {quantization.get('quant_method')!r}; name the checkpoint it was made from."
        )
    refuse_existing(arguments.output)
    source = Source(folder)
    writer = FP8Writer(source)
    if stacked := [name for name in source.shard_of if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        raise ValueError(
            f"{stacked[0]} holds the experts of a layer in one tensor; load the model here and save it again, which writes one "
            "matrix an expert as DeepSeek does."
        )
    if not any(map(writer.is_quantised, source.shard_of)):
        raise ValueError(f"{folder} has no matrices that FP8 is for; is it an adapter, or another model?")
    needed = sum(tensor.nbytes for name in source.shard_of for tensor in writer.change(name))
    check_space(arguments.output, needed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    headers = sorted((name, str(source.header(name))) for name in source.shard_of)
    job = Job(arguments.output, {"model": digest(config, headers), "format": arguments.format})
    with explain_interruption(job.scratch):
        job.write_shards(source, writer.change, "quantising")
        job.finish(folder, fp8_config(config, source))
    print(f"wrote {arguments.output}: {needed / 1e9:.3f} GB, {needed / source.total_bytes():.3f} of what it was")


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        run(arguments)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
