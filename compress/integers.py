"""int8 and int4 by llm-compressor: compressed-tensors files, which vLLM, SGLang and transformers open.

    int8   weights by row, activations by token as they come (W8A8)
    int4   weights in groups of 128, 64 or 32 columns, the largest that divides every width (W4A16)

    gptq   rounds one column after the other, each correcting the error of those before it (arXiv:2210.17323)
    awq    scales channels by what goes through them before they are rounded, exactly undone elsewhere (arXiv:2306.00978)

Quantised are the experts and other MLPs and attention's projections; as they are stay embedding, output head, routers,
norms, MLA's projections to and from its latents (engines read `kv_b_proj` as a matrix, and fuse `q_a_proj` with
`kv_a_proj_with_mqa`), what chooses in sparse attention, and the prediction modules, which llm-compressor does not run.

The whole model is in memory. llm-compressor wants an environment of its own: requirements-llm-compressor.txt.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from common.command import no_command
from common.loading import foreign_code, load_model, load_tokenizer
from compress.calibration import Calibration

GROUP_SIZES = (128, 64, 32)  # that engines have kernels for
_QUANTISED = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.(?:self_attn\.(?:q|k|v|o|q_b)_proj|mlp\.(?:(?:experts\.\d+|shared_experts)\.)?(?:gate|up|down)_proj)"
)
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "indexer"}
_ATTENTION |= {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"}


def write_integers(folder: Path, output: Path, form: str, method: str, calibration: Calibration):
    """
    Args:
        output: where llm-compressor writes weights, config.json and recipe.yaml.
        form: "int8" or "int4".
        method: "gptq" or "awq".

    Raises:
        ValueError: llm-compressor is not installed or cannot run the model, or a width is no multiple of 32.
    """
    try:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modeling.moe.linearize import linearize_moe
    except ImportError as error:
        raise ValueError(
            f"--format {form} needs llm-compressor ({error}), which wants an older transformers than this repository is pinned to: "
            "make an environment of its own by `pip install -r requirements-llm-compressor.txt` and run the same command there."
        ) from error
    model = load_model(folder, dtype="auto").eval()
    rows = [calibration.ids[row].tolist() for row in calibration.rows]
    linearize_moe(model)
    with _no_pinned_memory():
        oneshot(
            model=model,
            processor=load_tokenizer(folder),
            trust_remote_code_model=not foreign_code(folder),  # it reads config.json by AutoConfig
            dataset=Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]),
            recipe=recipe(model, form, method),
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
            max_seq_length=max(map(len, rows)),
            pipeline="sequential",
            sequential_targets=[type(model.model.layers[0]).__name__],
            output_dir=str(output),
        )


@contextmanager
def _no_pinned_memory() -> Iterator[None]:
    """AWQ asks for pinned memory, which without an accelerator raises."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        yield
        return
    original, IntermediatesCache.pin_memory = IntermediatesCache.pin_memory, lambda *arguments, **options: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = original


def recipe(model: nn.Module, form: str, method: str) -> list:
    """llm-compressor's modifiers for a model whose experts are Linear modules.

    Raises:
        ValueError: a width is no multiple of 32.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantised = {name: module for name, module in linear.items() if is_quantised(name, model.config.num_hidden_layers)}
    if form == "int8":
        weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
        inputs = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    else:
        size = group_size({name: module.in_features for name, module in quantised.items()})
        weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=size)
        inputs = None
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    settings = {"config_groups": {"group_0": scheme}, "ignore": sorted(linear.keys() - quantised.keys())}
    if method == "gptq":
        return [GPTQModifier(**settings)]
    return [AWQModifier(mappings=awq_mappings(model)), QuantizationModifier(**settings)]


def is_quantised(name: str, num_hidden_layers: int) -> bool:
    """Whether the Linear module of this name is."""
    match = _QUANTISED.fullmatch(name)
    return match is not None and int(match["layer"]) < num_hidden_layers


def group_size(widths: dict[str, int]) -> int:
    """The largest group that divides every width.

    Raises:
        ValueError: there is none.
    """
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in widths.values()):
            return size
    name, width = next((name, width) for name, width in widths.items() if width % GROUP_SIZES[-1])
    raise ValueError(
        f"{name} is {width} wide, no multiple of {GROUP_SIZES[-1]}, the smallest group of int4; use --format int8 or fp8."
    )


def awq_mappings(model: nn.Module) -> list:
    """Which modules' outputs are scaled down for which that read them: all of these, or the model would be another one.

    llm-compressor's own list for V3 fails where layers without experts come first, and that for V2 leaves out the router.

    Raises:
        ValueError: attention has parts whose readers are not known here.
    """
    from llmcompressor.modifiers.transform.awq import AWQMapping

    found = []
    for index, layer in enumerate(model.model.layers[: model.config.num_hidden_layers]):
        prefix = rf"re:^model\.layers\.{index}\."
        attention = dict(layer.self_attn.named_children())
        if unknown := attention.keys() - _ATTENTION:
            raise ValueError(
                f"--method awq scales what modules read, and it is not known here what {min(unknown)} in the attention of layer "
                f"{index} reads; use --method gptq."
            )
        if "q_b_proj" in attention:
            readers = [rf"{prefix}self_attn\.q_b_proj$"]
            readers += [rf"{prefix}self_attn\.indexer\.wq_b$"] if "indexer" in attention else []
            found.append(AWQMapping(rf"{prefix}self_attn\.q_a_layernorm$", readers))
        else:
            names = [name for name in ("q_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa") if name in attention]
            found.append(AWQMapping(f"{prefix}input_layernorm$", [rf"{prefix}self_attn\.{name}$" for name in names]))
        readers = [rf"{prefix}mlp\.gate$"] if layer.is_sparse else []
        readers += [rf"{prefix}mlp\.(.*\.)?{name}_proj$" for name in ("gate", "up")]
        found.append(AWQMapping(f"{prefix}post_attention_layernorm$", readers))
        found.append(AWQMapping(rf"{prefix}mlp\.(.*\.)?up_proj$", [rf"{prefix}mlp\.(.*\.)?down_proj$"]))
    return found


if __name__ == "__main__":
    no_command("write int8 and int4 by python -m compress.quantise")
