"""Between DeepSeek's checkpoint files and the modules in memory: names, layouts, precision, damage.

From top to bottom: names and layouts, the files of a folder and what may be wrong with them, and the steps of
`from_pretrained`: read the config, check the files, find out in which precision weights come.

The files keep one weight an expert, `mlp.experts.{i}.{gate,up,down}_proj.weight`; in memory the experts of a layer are
two stacked parameters. transformers converts both ways while it loads and saves, tensor by tensor.
"""

import copy
import json
import os
import re
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.generation import GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, is_kernels_available, logging

logger = logging.get_logger(__name__)

# What the fields of generation_config.json may be besides null: whole numbers from .. to .., other numbers from .. to ..,
# flags, tokens (one, or several as well), lists of tokens.
_LARGE = 2**31 - 1
_COUNTS = {"max_length": (1, _LARGE), "max_new_tokens": (1, _LARGE), "min_length": (0, _LARGE)}
_COUNTS |= {"min_new_tokens": (0, _LARGE), "num_beams": (1, 10_000), "num_return_sequences": (1, 10_000)}
_COUNTS |= {"top_k": (0, _LARGE), "no_repeat_ngram_size": (0, _LARGE), "prefill_chunk_size": (1, _LARGE)}
_COUNTS |= {"mtp_tokens": (0, 1_000), "prompt_lookup_num_tokens": (1, _LARGE), "num_assistant_tokens": (1, _LARGE)}
_COUNTS |= {"max_matching_ngram_size": (1, _LARGE), "max_cache_len": (1, _LARGE)}
_NUMBERS = {"temperature": (0, 1e6), "top_p": (0, 1), "min_p": (0, 1), "top_h": (0, 1), "typical_p": (0, 1)}
_NUMBERS |= {"epsilon_cutoff": (0, 1), "eta_cutoff": (0, 1), "assistant_confidence_threshold": (0, 1)}
_NUMBERS |= {"repetition_penalty": (1e-6, 1e6), "length_penalty": (-1e6, 1e6), "guidance_scale": (0, 1e6)}
_NUMBERS |= {"max_time": (0, 1e9), "encoder_repetition_penalty": (1e-6, 1e6)}
_FLAGS = ("do_sample", "use_cache", "use_mtp", "renormalize_logits", "remove_invalid_values", "token_healing")
_FLAGS += ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate")
_FLAGS += ("disable_compile",)
_TOKENS = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
_SOME_TOKENS = ("eos_token_id", "forced_eos_token_id")
_TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens")

_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them

# The arguments of `from_pretrained` that say where a checkpoint is.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder", "proxies")


def register_expert_conversion(model_type: str):
    """Tells transformers how the per-expert weights of a file become stacked parameters; saving runs it backwards.

    Without this, custom code loads experts as random numbers with no more than a warning.
    """
    conversion: list[Any] = [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]
    # This module may be executed more than once in a process, once for each copy of the code.
    register_checkpoint_conversion_mapping(model_type, conversion, overwrite=True)


def is_quantised(config, quantization_config) -> bool:
    """Whether a library will quantise Linear layers, or has done so in the checkpoint; block-scaled FP8 is not meant."""
    quantization = quantization_config or getattr(config, "quantization_config", None)
    if quantization is None:
        return False
    as_dict = quantization if isinstance(quantization, dict) else quantization.to_dict()
    return as_dict.get("quant_method") != "fp8"


def ignored_mtp_keys(config) -> list[str]:
    """Patterns of keys that a checkpoint may have and the model does without.

    Published multi-token-prediction modules carry copies of the embedding and the output head, which the model shares;
    and a model may be built with fewer modules than the checkpoint has.
    """
    first_absent = config.num_hidden_layers + config.num_nextn_predict_layers
    absent = "|".join(str(first_absent + k) for k in range(16))
    return [r"layers\.\d+\.(embed_tokens|shared_head\.head)\.weight", rf"layers\.({absent})\."]


# ---------------------------------------------------------------------------------------------------------------
# What is in the files
# ---------------------------------------------------------------------------------------------------------------


class CheckpointFiles:
    """The safetensors files of a folder or of a repository on the Hub, their headers checked.

    Args:
        path: as for `from_pretrained`.
        hub_kwargs: the keyword arguments of `from_pretrained`; those that say where to look are used.

    Raises:
        ValueError: the index is none, or a file of a local folder is missing, truncated or no safetensors file.
    """

    def __init__(self, path, hub_kwargs: dict):
        self.where = {name: hub_kwargs[name] for name in HUB_ARGUMENTS if hub_kwargs.get(name) is not None}
        self.path = path
        self._variant = hub_kwargs.get("variant")
        self.shard_of: dict[str, str] = {}  # tensor name -> file name; empty where there are no safetensors files
        self.headers: dict[
            str, dict
        ] = {}  # tensor name -> its dtype and shape; of the shards that are on this machine
        # In transformers' order: one file goes before shards, which a model saved again leaves beside it.
        if (single := self.find(SAFE_WEIGHTS_NAME)) is not None:
            self.headers = _read_header(single)
            self.shard_of = dict.fromkeys(self.headers, SAFE_WEIGHTS_NAME)
        elif (index := self.find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
            self._read_index(index)

    def find(self, name: str, optional: bool = True) -> str | None:
        """Local path of a file of the checkpoint, fetched if need be; None if it has no such file."""
        if self._variant is not None and name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME):
            name = name.replace(".safetensors", f".{self._variant}.safetensors", 1)
        return cached_file(
            self.path,
            name,
            **self.where,
            _raise_exceptions_for_missing_entries=not optional,
            _raise_exceptions_for_connection_errors=not optional,
        )

    def count_mtp_modules(self, num_hidden_layers: int) -> int:
        """The multi-token-prediction modules behind so many layers: layers that have what only such a module has."""
        found = {int(match[1]) for name in self.shard_of if (match := re.search(r"\blayers\.(\d+)\.eh_proj\.", name))}
        return next(k for k in range(len(found) + 1) if num_hidden_layers + k not in found)

    def _read_index(self, index: str):
        with open(index, encoding="utf-8") as file:
            try:
                self.shard_of = {key: str(name) for key, name in json.load(file)["weight_map"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} is not a safetensors index; download the file again.") from error
        for name in set(self.shard_of.values()):
            if name != os.path.basename(name) or name in ("", ".", ".."):
                raise ValueError(
                    f"{index} names the shard {name!r}, which is no file of the same folder; the index is damaged or not "
                    "to be trusted, download it again."
                )
        if not os.path.isdir(self.path):
            return  # on the Hub, shards are fetched later
        for name in sorted(set(self.shard_of.values())):
            shard = os.path.join(os.path.dirname(index), name)
            if not os.path.isfile(shard):
                raise ValueError(f"{index} names the shard {name}, which is not there; download it again.")
            header = _read_header(shard)
            absent = [key for key, file in self.shard_of.items() if file == name and key not in header]
            if absent:
                raise ValueError(f"{shard} lacks {absent[0]}, which the index says it holds; download it again.")
            self.headers |= {key: entry for key, entry in header.items() if self.shard_of.get(key) == name}

    def check(self, model: torch.nn.Module, shapes: bool, whole: bool):
        """Compares what a model (on the meta device) needs with what is here, before anything is loaded.

        Args:
            shapes: whether tensors of another shape are an error.
            whole: whether missing ones are; those of a task's head never are, and those of an indexer are not where there
                is none, so that models may be given one.

        Raises:
            ValueError: naming the tensor; an expert's under the name that it has in the files.
        """
        if shapes:
            self._check_expert_count(model.config)
        lists_indexers = any(".indexer." in name for name in self.shard_of)
        for name, shape in _names_in_files(model, self.shard_of):
            name, optional = self._own_name(name), _belongs_to_head(name, model)
            if name not in self.shard_of:
                if whole and not optional and (lists_indexers or ".indexer." not in name):
                    raise ValueError(
                        f"{self.path} has no tensor {name}, which its config.json asks for. The files are not whole, or "
                        "another model's: download them again, or use the config.json that belongs to them."
                    )
                continue
            header = self.headers.get(name, {"dtype": "F32", "shape": shape})
            if not header["dtype"].startswith((*_FLOATS, "F8")):
                raise ValueError(
                    f"{name} in {self.path} holds {header['dtype']}, not floating-point numbers, and config.json names no "
                    "`quantization_config` that would say what they mean. Download the files again, or convert them."
                )
            if shapes and tuple(header["shape"]) != tuple(shape):
                raise ValueError(
                    f"{name} in {self.path} has shape {tuple(header['shape'])}, but its config.json asks for "
                    f"{tuple(shape)}. Use the config.json that belongs to the weights, or download both again. For a "
                    "changed vocabulary, load and then call model.resize_token_embeddings."
                )

    def _check_expert_count(self, config):
        """Tells pruned experts, which some tools leave out of config.json, from damage."""
        routers = {name: re.search(r"\blayers\.(\d+)\.mlp\.gate\.weight$", name) for name in self.headers}
        rows = {int(match[1]): self.headers[name]["shape"][0] for name, match in routers.items() if match}
        counts = {number for layer, number in rows.items() if layer < config.num_hidden_layers}
        expected = getattr(config, "n_routed_experts", None)
        if expected is None or len(counts) != 1 or counts == {expected}:
            return
        number = counts.pop()
        unpruned = sorted(i for i in rows if i >= config.num_hidden_layers and rows[i] != number)
        remedy = f"Set `n_routed_experts` to {number} in config.json"
        if unpruned:
            remedy += (
                f", and `num_nextn_predict_layers` to 0, since the prediction module in layer {unpruned[0]} still has "
                f"{rows[unpruned[0]]}"
            )
        raise ValueError(
            f"`n_routed_experts` is {expected}, but every router in {self.path} has the shape for {number} experts: a tool has pruned them "
            f"without saying so in config.json, as llm-compressor does, or config.json is another model's. {remedy}; or use "
            "the config.json that belongs to the weights."
        )

    def check_scales(self, block_size: tuple[int, int] | None):
        """
        Args:
            block_size: of block-scaled FP8; None where config.json says nothing of it.

        Raises:
            ValueError: an FP8 matrix has no scales, or of another shape, or what has scales is no FP8 matrix.
        """
        remedy = "The checkpoint is not whole or was changed; download it again."
        suffix = "_scale_inv"
        scaled = {name.removesuffix(suffix) for name in self.shard_of if name.endswith(suffix)}
        fp8 = {name for name, header in self.headers.items() if header["dtype"].startswith("F8")}
        if block_size is None and (scaled or fp8):
            raise ValueError(
                f"{min(scaled | fp8)} in {self.path} is FP8, but config.json has no `quantization_config`, without which "
                "its numbers mean nothing. Use the config.json that belongs to the weights."
            )
        if orphans := scaled - self.shard_of.keys():
            raise ValueError(f"{self.path} has {min(orphans)}{suffix} but no {min(orphans)}. {remedy}")
        if bare := fp8 - scaled:
            raise ValueError(f"{min(bare)} in {self.path} is FP8 but has no {min(bare)}{suffix}. {remedy}")
        sides = block_size or ()
        for name in sorted(scaled & self.headers.keys()):
            header, scale = self.headers[name], self.headers[name + suffix]
            if name not in fp8 or len(header["shape"]) != 2:
                raise ValueError(
                    f"{self.path} has {name}{suffix}, but {name} is {header['dtype']} of shape {header['shape']}, no FP8 "
                    f"matrix. {remedy}"
                )
            expected = [-(-size // block) for size, block in zip(header["shape"], sides, strict=True)]
            if scale["shape"] != expected or scale["dtype"] not in _FLOATS:
                raise ValueError(
                    f"{name}{suffix} in {self.path} is {scale['dtype']} of shape {scale['shape']}; blocks of {block_size} "
                    f"in a matrix of shape {header['shape']} have scales of shape {expected}. {remedy}"
                )

    def _own_name(self, name: str) -> str:
        """A parameter's name as these files have it: with or without the prefix of a base model."""
        names = (name, f"model.{name}", name.removeprefix("model."))
        return next((own for own in names if own in self.shard_of), name)

    def slices(self) -> dict:
        """Tensor name -> its safetensors slice: `slice[...]` reads it."""
        shards = {name: self.find(name, optional=False) for name in sorted(set(self.shard_of.values()))}
        handles = {name: safe_open(file, framework="pt") for name, file in shards.items()}
        slices = {key: handles[name].get_slice(key) for key, name in self.shard_of.items()}
        self.headers = {key: {"dtype": x.get_dtype(), "shape": x.get_shape()} for key, x in slices.items()}
        return slices


def _names_in_files(model: torch.nn.Module, present) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model's tensors as the files have them: one weight an expert, unless a stack is `present`."""
    for name, tensor in model.state_dict().items():
        path, _, last = name.rpartition(".")
        if not path.endswith("mlp.experts") or any(own in present for own in (name, f"model.{name}")):
            yield name, tuple(tensor.shape)
            continue
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        shape = (tensor.shape[1] // len(parts), tensor.shape[2])
        yield from ((f"{path}.{i}.{part}.weight", shape) for i in range(len(tensor)) for part in parts)


def _belongs_to_head(name: str, model: Any) -> bool:
    """Whether a checkpoint may lack a tensor: the head of a task, which is still to be trained, and a tied output head.
    The output head of what was saved as a language model must be there."""
    if name.startswith("model.") or not hasattr(model, "model"):
        return False
    saved_as = (model.config.architectures or [""])[0]
    return name != "lm_head.weight" or model.config.tie_word_embeddings or not saved_as.endswith("ForCausalLM")


def _read_header(path: str) -> dict:
    """The names of a safetensors file and where their data lie; checks that the file is as long as it says."""
    size = os.path.getsize(path)
    remedy = "The file is damaged or was not downloaded whole; download it again."
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path} is no safetensors file ({size} bytes). {remedy}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            expected = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} has an unreadable safetensors header. {remedy}") from error
    if size < expected:
        raise ValueError(f"{path} has {size} bytes, its header promises {expected}. {remedy}")
    try:
        safe_open(path, framework="pt")  # checks what the header says of each tensor
    except SafetensorError as error:
        raise ValueError(f"{path} has a wrong safetensors header ({error}). {remedy}") from error
    return header


def check_generation_config(path: str, vocab_size: int):
    """Looks at a generation_config.json, which transformers takes as it is, or passes over if it is no JSON.

    Raises:
        ValueError: it is no JSON object, or a field has a value of a wrong kind; the message names both.
    """
    with open(path, encoding="utf-8") as file:
        try:
            fields = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON ({error}). Download it again, or remove it.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is no JSON object with fields of generation. Download it again, or remove it.")
    for name, value in fields.items():
        if value is None:
            continue
        # what forces or forbids a token must be one of the model's
        most = (
            vocab_size - 1 if name.startswith("forced_") or "suppress" in name or name == "bad_words_ids" else _LARGE
        )
        if allowed := _what_is_allowed(name, value, most):
            raise ValueError(f"`{name}` is {value!r} in {path}; it must be {allowed}, or null. Correct the file.")


def _what_is_allowed(name: str, value, most_token: int) -> str | None:
    """What a field of generation_config.json must be if this value is not possible, else None."""

    def is_count(number, least: int, most: int) -> bool:
        return isinstance(number, int) and is_number(number, least, most)

    def is_number(number, least: float, most: float) -> bool:
        return isinstance(number, (int, float)) and not isinstance(number, bool) and least <= number <= most

    def are_tokens(tokens) -> bool:
        return isinstance(tokens, list) and all(is_count(token, 0, most_token) for token in tokens)

    if name in _COUNTS:
        least, most = _COUNTS[name]
        return None if is_count(value, least, most) else f"a whole number from {least} to {most}"
    if name in _NUMBERS:
        least, most = _NUMBERS[name]
        return None if is_number(value, least, most) else f"a number from {least} to {most:g}"
    if name in _FLAGS:
        return None if isinstance(value, bool) else "true or false"
    if name in _TOKENS:
        return None if are_tokens([value]) else f"a token's number from 0 to {most_token}"
    if name in _SOME_TOKENS:
        several = value if isinstance(value, list) and value else [value]
        return None if are_tokens(several) else f"a token's number from 0 to {most_token}, or a list of such"
    if name in _TOKEN_LISTS:
        return None if are_tokens(value) else f"a list of tokens' numbers from 0 to {most_token}"
    if name == "bad_words_ids":
        is_list = isinstance(value, list) and all(tokens and are_tokens(tokens) for tokens in value)
        return None if is_list else f"a list of lists of tokens' numbers from 0 to {most_token}"
    if name == "sequence_bias":
        pairs = value if isinstance(value, list) else [value]
        is_list = all(isinstance(pair, list) and len(pair) == 2 and are_tokens(pair[0]) for pair in pairs)
        return None if is_list else "a list of pairs, a list of tokens' numbers and a number"
    if name == "exponential_decay_length_penalty":
        is_pair = isinstance(value, list) and len(value) == 2
        is_pair = is_pair and is_count(value[0], 0, _LARGE) and is_number(value[1], 1e-6, 1e6)
        return None if is_pair else "a pair, the number of a token and a factor"
    if name == "watermarking_config":
        return None if isinstance(value, dict) else "an object"
    if name == "stop_strings":
        texts = value if isinstance(value, list) else [value]
        return None if all(isinstance(text, str) for text in texts) else "a text, or a list of texts"
    if name == "early_stopping":
        return None if isinstance(value, bool) or value == "never" else "true, false or 'never'"
    return None


# ---------------------------------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------------------------------


class DequantisedSlice:
    """A block-scaled FP8 matrix that becomes float32 when it is read, W = fp8 * scale_inv block by block.

    Looks to transformers' loader like a safetensors slice, so a checkpoint is dequantised tensor by tensor while it
    loads, on any device, and never lies in memory twice.
    """

    def __init__(self, weight, scale_inv, block_size: tuple[int, int]):
        self.weight = weight  # fp8 [rows, columns]
        self.scale_inv = scale_inv  # [ceil(rows / block rows), ceil(columns / block columns)]
        self.block_rows, self.block_columns = block_size

    def get_shape(self) -> list[int]:
        return self.weight.get_shape()

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index) -> torch.Tensor:
        matrix = self.weight[...].float()  # [rows, columns]
        # The last blocks of a row or column may be cut off: 576 rows of kv_a_proj_with_mqa are 4.5 blocks.
        scales = self.scale_inv[...].float().repeat_interleave(self.block_columns, dim=1)[:, : matrix.shape[1]]
        for i, rows in enumerate(matrix.split(self.block_rows)):
            rows *= scales[i]
        return matrix[index]


def hardware_has_fp8(device_map) -> bool:
    """Whether transformers' FP8 layers would run where the weights go: all on CUDA devices with FP8 arithmetic (compute
    capability 8.9 and later), with the `kernels` package that fetches the kernels."""
    places = device_map.values() if isinstance(device_map, dict) else (device_map,)
    if any(place is None or str(place) in ("cpu", "disk", "meta") for place in places):
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9) and is_kernels_available()


def keep_unscaled_layers(config, files: CheckpointFiles):
    """Tells transformers which layers of an FP8 checkpoint have no scales: output head, `eh_proj`, ..."""
    suffix = ".weight_scale_inv"
    scaled = {name.removesuffix(suffix).rsplit(".", 1)[-1] for name in files.shard_of if name.endswith(suffix)}
    names = {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in files.shard_of if name.endswith(".weight")}
    # with the end of the name, since "gate" is also how "gate_proj" begins
    config.quantization_config["modules_to_not_convert"] = [rf"(.*\.)?{name}$" for name in sorted(names - scaled)]


def pop_block_fp8(config) -> tuple[int, int] | None:
    """The block size of a block-scaled FP8 checkpoint, else None.

    Takes the `quantization_config` off the config: the weights in memory, and those saved from there, are plain.
    """
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        return None
    block_size = quantization.get("weight_block_size")
    is_pair = isinstance(block_size, (list, tuple)) and len(block_size) == 2
    if not is_pair or not all(type(size) is int and size > 0 for size in block_size):
        raise ValueError(
            f"`quantization_config.weight_block_size` is {block_size!r}; DeepSeek's FP8 checkpoints have [128, 128]."
        )
    del config.quantization_config
    return tuple(block_size)


def dequantised_state_dict(files: CheckpointFiles, block_size: tuple[int, int]) -> dict:
    """Every tensor of an FP8 checkpoint, to be read one at a time; those with a scale as `DequantisedSlice`.

    Raises:
        ValueError: as `check_scales`.
    """
    slices = files.slices()
    files.check_scales(block_size)
    suffix = "_scale_inv"
    scales = {key.removesuffix(suffix): slices.pop(key) for key in list(slices) if key.endswith(suffix)}
    return slices | {key: DequantisedSlice(slices[key], scale, block_size) for key, scale in scales.items()}


@contextmanager
def one_tensor_at_a_time():
    """Makes transformers read a tensor when its turn comes; its threads would read ahead, up to the whole model."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def default_dtype(config, device_map) -> torch.dtype | str:
    """What `dtype` means where the user does not say: the checkpoint's own, but float32 where bfloat16 is emulated."""
    on_cpu = device_map in (None, "cpu") and not torch.accelerator.is_available()
    if on_cpu and config.dtype == torch.bfloat16 and not _cpu_has_bfloat16():
        logger.warning_once(
            "This CPU has no bfloat16 arithmetic (it would be hundreds of times slower), so the model is loaded in "
            "float32. Pass dtype='bfloat16' to keep the checkpoint's precision."
        )
        return torch.float32
    return "auto"


def _cpu_has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def explain_loading_error(path):
    """Says what to do where transformers refuses tensors of a wrong shape, or finds no safetensors file."""
    try:
        yield
    except OSError as error:
        if SAFE_WEIGHTS_NAME not in str(error):
            raise
        raise OSError(
            f"{error} Weights in pickle files (pytorch_model.bin) are read only with use_safetensors=False."
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"Weights in {path} do not have the shape that its config.json asks for; the report above names them. Use "
            "the config.json that belongs to the weights. For a changed vocabulary, load and then call "
            "model.resize_token_embeddings."
        ) from error


def read_config(config_class, path, kwargs: dict):
    """The config of a checkpoint, and of the arguments of `from_pretrained` those that are left for the weights."""
    # Reading the config uses up what says where it is, which the weights need too; dtypes are theirs alone.
    where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    own = ("dtype", "torch_dtype", "quantization_config")
    precision = {name: kwargs[name] for name in own if name in kwargs}
    others = {name: value for name, value in kwargs.items() if name not in own}
    config, unused = config_class.from_pretrained(path, return_unused_kwargs=True, **others)
    return config, unused | where | precision


def settle_experts(config, kwargs: dict):
    """Decides how experts lie in memory, where the config leaves it open.

    Raises:
        ValueError: as separate modules, with tensor or expert parallelism.
    """
    if config.separate_experts is None:
        config.separate_experts = is_quantised(config, kwargs.get("quantization_config"))
    if config.separate_experts and (kwargs.get("tp_plan") or kwargs.get("distributed_config")):
        raise ValueError(
            "`separate_experts` (which quantised weights imply) does not go with tensor or expert parallelism, whose "
            "plans are for stacked experts. Use `device_map`, or pass separate_experts=False."
        )


def check_checkpoint(model_class, files: CheckpointFiles, config, kwargs: dict):
    """Refuses files that are not those of the model that the config describes, and does without prediction modules that
    they lack.

    Args:
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: a file is missing or damaged, or a tensor is missing or has another shape; the message names it.
    """
    if model_class.can_generate() and (generation_config := files.find("generation_config.json")) is not None:
        check_generation_config(generation_config, config.vocab_size)
    if not files.shard_of:
        return
    present = files.count_mtp_modules(config.num_hidden_layers)
    config.num_nextn_predict_layers = min(config.num_nextn_predict_layers, present)
    if is_quantised(config, kwargs.get("quantization_config")) or kwargs.get("key_mapping"):
        return  # names and shapes are the library's
    files.check_scales(pop_block_fp8(copy.deepcopy(config)))
    if kwargs.get("state_dict") is not None:
        return
    config = copy.deepcopy(config)
    config.quantization_config = None
    with torch.device("meta"):
        model = model_class(config)
    files.check(
        model,
        shapes=not kwargs.get("ignore_mismatched_sizes"),
        whole=not kwargs.get("output_loading_info"),  # who asks for the report wants to see for himself
    )


class PlainWeights:
    """Weights that transformers reads from the files by itself."""

    def __init__(self, files: CheckpointFiles):
        self.files = files
        self.arguments = {"pretrained_model_name_or_path": files.path}  # of transformers' `from_pretrained`

    def reading(self) -> AbstractContextManager:
        """A context in which transformers reads them."""
        return nullcontext()

    def finish(self, model: Any):
        """Puts right what transformers could not know."""


class KeptFP8(PlainWeights):
    """Block-scaled FP8 that stays FP8, on GPUs that have such arithmetic."""

    def __init__(self, files: CheckpointFiles, config, quantization: dict):
        super().__init__(files)
        self.not_converted = quantization.get("modules_to_not_convert")
        config.quantization_config = dict(quantization)
        keep_unscaled_layers(config, files)

    def finish(self, model: Any):
        """The config says what the file's says."""
        model.config.quantization_config.modules_to_not_convert = self.not_converted


class DequantisedFP8(PlainWeights):
    """Block-scaled FP8 whose numbers are multiplied by their scales while they are read, one tensor at a time."""

    def __init__(self, files: CheckpointFiles, block_size: tuple[int, int]):
        super().__init__(files)
        state_dict = dequantised_state_dict(files, block_size)
        self.arguments = {"pretrained_model_name_or_path": None, "state_dict": state_dict}

    def reading(self):
        """Without transformers' threads that read ahead."""
        return one_tensor_at_a_time()

    def finish(self, model: Any):
        """The model was loaded from tensors, so what else transformers finds by the path is still to be done."""
        path = self.files.path
        model.name_or_path = model.config.name_or_path = str(path)
        if model.can_generate() and self.files.find("generation_config.json") is not None:
            model.generation_config = GenerationConfig.from_pretrained(path, **self.files.where)


def find_weights(files: CheckpointFiles, config, device_map) -> PlainWeights:
    """In which precision weights come from the files. Of block-scaled FP8 the config forgets its `quantization_config`,
    unless it stays FP8."""
    quantization: Any = getattr(config, "quantization_config", None)
    block_size = pop_block_fp8(config)
    if block_size is None:
        return PlainWeights(files)
    if hardware_has_fp8(device_map):
        return KeptFP8(files, config, quantization)
    return DequantisedFP8(files, block_size)
