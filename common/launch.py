"""What a launcher asks for is what runs: every trainer joins its processes by `join_processes`, before it writes anything.

Launchers (`accelerate launch`, `torchrun`, MPI) say in environment variables how many processes they start and how those
share a model. Where accelerate finds no accelerator it passes over both without a word: each process then trains for itself.
"""

import importlib.util
import os

from accelerate import DistributedType, PartialState
from accelerate.utils import get_int_from_env, parse_flag_from_env

_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # torch's and the MPIs'
_CPU = (
    "On CPUs set ACCELERATE_USE_CPU=true and replicate the model (configs/accelerate/ddp.yaml), or start one process."
)


def join_processes(accumulation_steps: int, precision: str | None = None, cpu: bool = False) -> PartialState:
    """Join the processes that were started together.

    Args:
        accumulation_steps: micro-batches of an optimizer step that the command's own options ask for.
        precision: "no", "fp16" or "bf16", as the command's own options say; None leaves it to the launcher.
        cpu: stay on the CPU, as ACCELERATE_USE_CPU does.

    Raises:
        ValueError: they did not find each other, or what the launcher asks for is not what would run.
    """
    _check_settings(accumulation_steps, precision)
    on_cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=True) if on_cpu else PartialState()
    started = get_int_from_env(_COUNTS, 1)
    if state.num_processes != started:
        raise ValueError(
            f"{started} processes were started together, but this one found {state.num_processes} (on {state.device.type}, "
            f"distribution {state.distributed_type.value}), so each would train a model of its own into one folder. {_CPU}"
        )
    kind = state.distributed_type
    sharding = (
        kind.value.startswith("MULTI_") and kind != DistributedType.MULTI_CPU
    )  # accelerate shards on accelerators
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not (sharding or kind == DistributedType.FSDP):
        raise ValueError(
            f"the launcher asks for FSDP, which accelerate has on accelerators only; this process is on {state.device.type} "
            f"(distribution {kind.value}). {_CPU}"
        )
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and kind != DistributedType.DEEPSPEED:
        raise ValueError(
            f"the launcher asks for DeepSpeed, but the distribution is {kind.value}, on {state.device.type}. {_CPU}"
        )
    return state


def _check_settings(accumulation_steps: int, precision: str | None) -> None:
    """Raise ValueError for what a launcher asks that the trainers do not do, or do otherwise."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "the launcher asks for DeepSpeed, which is not installed; pip install deepspeed, or use FSDP2 "
            "(configs/accelerate/fsdp2.yaml)"
        )
    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError("the launcher asks for Megatron-LM, which does not run here; use FSDP2 or DeepSpeed")
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        for name in ("TP_SIZE", "CP_SIZE", "SP_SIZE"):
            size = get_int_from_env([f"PARALLELISM_CONFIG_{name}"], 1)
            if size > 1:
                raise ValueError(
                    f"the launcher asks for parallelism_config_{name.lower()} {size}; the trainers give every process rows of "
                    "its own, so it must be 1: raise parallelism_config_dp_shard_size instead"
                )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision is not None and asked not in ("no", precision):
        raise ValueError(
            f"the launcher asks for mixed_precision {asked!r}, the command for {precision!r}; set mixed_precision to 'no' "
            "in the launcher's config, so that the command chooses, or ask for the same"
        )
    asked = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto").lower()
    if asked not in ("auto", "1", str(accumulation_steps)):
        raise ValueError(
            f"the launcher asks for gradient_accumulation_steps {asked}, the command for {accumulation_steps}; set the "
            "launcher's to 'auto', so that the command chooses, or both to the same"
        )
