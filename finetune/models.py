"""Loads models for fine-tuning and applies a method to them: LoRA, QLoRA, ESFT or full."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import loading
from common.command import no_command
from common.remote_code import quant_method
from finetune.config import CommonOptions
from finetune.experts import ESFT_WEIGHTS, Routing, choose_experts, describe_choice, load_esft, train_only_experts
from finetune.lora import load_adapter, lora_config, whole_size


def load_model(
    model_dir: str,
    dtype: str = "auto",
    quantise: str = "none",
    attention: str | None = None,
    balance_loss: float = 0.0,
    mtp_loss: float = 0.0,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer for fine-tuning.

    Args:
        model_dir: folder or Hub name.
        dtype: of the weights; "auto" is the checkpoint's. LoRA's factors are float32 in any case.
        quantise: "none", or how the frozen Linear weights are held: "nf4" (bitsandbytes), "int8" (torchao). The stacked
            routed experts are no Linear layers, and neither library quantises them.
        attention: attention implementation; None is transformers' choice.
        balance_loss, mtp_loss: weights of the model's own losses; 0 leaves them out.
        trust_remote_code: whether code of the checkpoint may run, instead of this repository's.

    Raises:
        ValueError: the tokenizer has ids that the model's vocabulary lacks, or this machine lacks what the
        quantisation needs.
        OSError: there is no such model.
    """
    if Path(model_dir).is_dir():
        model_dir = str(Path(model_dir).resolve())  # adapters note where their base is
    config = loading.load_config(model_dir, trust_remote_code)
    if (method := quant_method(config)) == "compressed-tensors":
        raise ValueError(
            f"{model_dir} is quantised by {method}, whose weights cannot be trained, nor LoRA merged into them; fine-tune the "
            "checkpoint that it was made of, and quantise the result with python -m compress.quantise"
        )
    config.mtp_loss_weight = mtp_loss
    config.aux_loss_alpha = balance_loss
    tokenizer = loading.load_tokenizer(model_dir, trust_remote_code)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {model_dir} has {len(tokenizer)} tokens, but `vocab_size` is {config.vocab_size}; use the "
            "tokenizer that belongs to the model, or call model.resize_token_embeddings(len(tokenizer)) and save"
        )
    more: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if quantise != "none":
        more["quantization_config"] = quantisation_config(quantise)
        config.separate_experts = False  # LoRA's targets, ESFT and merging are for stacked ones
    model = loading.load_model(model_dir, trust_remote_code, config, dtype=dtype, **more)
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50: the first evaluation on a CPU would pack the weights for a product that has no gradient
            # (training would go on without a word) and that wants multiples of 32 as widths.
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer


def quantisation_config(quantise: str):
    """The transformers configuration of "nf4" or "int8".

    Raises:
        ValueError: the library is not installed, or the machine cannot.
    """
    left_out = ["lm_head", "shared_head", "gate"]
    if quantise == "nf4":
        from transformers import BitsAndBytesConfig
        from transformers.utils import is_bitsandbytes_available

        if not is_bitsandbytes_available():
            raise ValueError(
                "quantise is 'nf4', which needs bitsandbytes; pip install bitsandbytes, use 'int8' (torchao), or leave "
                "quantise out"
            )
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            # on CPUs float32, since bfloat16 may be emulated there
            bnb_4bit_compute_dtype=torch.bfloat16 if torch.accelerator.is_available() else torch.float32,
            llm_int8_skip_modules=left_out,
        )
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise ValueError(f"quantise is 'int8', which needs torchao ({error}); pip install torchao") from error
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=left_out)


def load_result(model: PreTrainedModel, folder: str | Path) -> nn.Module:
    """Load the result of a LoRA or ESFT run onto its base model.

    Raises:
        FileNotFoundError, ValueError: there is nothing of the kind, or it is another model's.
    """
    if (Path(folder) / ESFT_WEIGHTS).is_file():
        load_esft(model, folder)
        return model
    return load_adapter(model, folder)


def prepare(
    model: PreTrainedModel,
    options: CommonOptions,
    measure: Callable[[], dict[int, Routing]],
    mtp: bool = False,
    own_losses: bool = False,
) -> tuple[LoraConfig | None, str]:
    """Apply the method to a loaded model, and describe what will be trained.

    Args:
        model: from `load_model`, on its device.
        options: method and its options.
        measure: makes the routing statistics that ESFT chooses by.
        mtp: whether the multi-token-prediction modules are trained.
        own_losses: whether the trainer adds the model's own losses; without them nothing teaches DSA's indexer.

    Returns:
        PEFT's configuration, for the trainer to apply (None for the other methods), and a table to print.

    Raises:
        ValueError: the model lacks what the options name.
    """
    if options.method == "lora":
        return lora_config(
            model, options.targets, options.rank, options.alpha, options.dropout, mtp, options.rslora, options.dora
        ), ""
    if options.method == "esft":
        routing = measure()
        chosen = choose_experts(routing, options.esft_score, options.expert_threshold)
        train_only_experts(model, chosen)
        return None, describe_choice(chosen, routing, options.esft_score) + "\n" + describe_trainable(model)
    _freeze_for_full(model, options.train_router, mtp, own_losses)
    return None, describe_trainable(model)


def _freeze_for_full(model: PreTrainedModel, train_router: bool, mtp: bool, indexer: bool) -> None:
    """Train everything but the router (unless asked for) and the parameters that the loss does not reach."""
    model.requires_grad_(True)
    first_mtp = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if "expert_load" in vars(module) and not train_router:
            module.requires_grad_(False)
        if name.endswith(".indexer") and not indexer:
            module.requires_grad_(False)
        if (
            name.startswith("model.layers.")
            and name.count(".") == 2
            and int(name.split(".")[2]) >= first_mtp
            and not mtp
        ):
            module.requires_grad_(False)


def trainable_parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(whole_size(parameter) for parameter in model.parameters() if parameter.requires_grad)


def describe_trainable(model: nn.Module) -> str:
    """One line: how much of the model is trained."""
    everything = sum(
        whole_size(parameter)
        for name, parameter in model.named_parameters()
        if ".slices." not in name  # these share their memory with a stack that is counted
    )
    trained = trainable_parameters(model)
    return f"trained: {trained:,} of {everything:,} numbers ({trained / everything:.1%})"


if __name__ == "__main__":
    no_command("fine-tune by python -m finetune.sft, .dpo or .grpo")
