"""Runs a checkpoint over many tokens layer by layer, so that a model of any size needs the memory of a part of one layer.

Held are the states of all tokens, one layer's attention, router and shared experts, and one routed expert at a time: each
expert is read once and sees all tokens that chose it. FP8 is dequantised as it is read.

Letters: N tokens of all rows one after the other, D hidden size, E experts, P experts a token, n tokens of a chunk.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.command import no_command
from common.loading import load_config, new_model
from common.remote_code import quant_method
from compress.scores import Visits
from loading_deepseek import CheckpointFiles, default_dtype, dequantised_state_dict, pop_block_fp8

_CHUNK = 4096  # tokens that go through an MLP at once
_VOCABULARY_CHUNK = 8192  # rows of the embedding or the head that are read at once
_LOSS_TOKENS = 512


class LayerByLayer:
    """A checkpoint folder of this family.

    Args:
        folder: with config.json and safetensors files.
        dtype: of the arithmetic; None: the checkpoint's own, float32 on CPUs without bfloat16.
        device: where the arithmetic is done.

    Attributes:
        config: with as many prediction modules as the files have.
        num_layers: decoder layers and prediction modules.

    Raises:
        ValueError: the weights are missing, damaged, or quantised by a library.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, device: str = "cpu"):
        self.config = load_config(folder)
        self.device = torch.device(device)
        self.files = CheckpointFiles(folder, {})
        if not self.files.shard_of:
            raise ValueError(
                f"{folder} has no safetensors weights; save the model with transformers' `save_pretrained`."
            )
        present = self.files.count_mtp_modules(self.config.num_hidden_layers)
        self.config.num_nextn_predict_layers = min(self.config.num_nextn_predict_layers, present)
        block_size = pop_block_fp8(self.config)
        if (method := quant_method(self.config)) is not None:
            raise ValueError(
                f"{folder} is quantised by {method!r}, which is not read layer by layer; prune the checkpoint it was made "
                "from, and quantise the result."
            )
        self.files.check_scales(block_size)
        with torch.device("meta"):
            self._skeleton = new_model(self.config)
        self.files.check(self._skeleton, shapes=True, whole=True)
        rotary = type(self._skeleton.model.rotary_emb)
        self._skeleton.model.rotary_emb = rotary.from_config(self.config).to(self.device)
        self._skeleton.eval()
        self._exact = self._skeleton._keep_in_fp32_modules_strict  # parts of names
        chosen = default_dtype(self.config, device) if dtype is None else dtype
        self.dtype = self.config.dtype or torch.float32 if chosen == "auto" else chosen
        self._tensors = dequantised_state_dict(self.files, block_size) if block_size else self.files.slices()
        self.num_layers = self.config.num_hidden_layers + self.config.num_nextn_predict_layers

    def is_sparse(self, index: int) -> bool:
        """Whether a layer has routed experts."""
        return self._skeleton.model.layers[index].is_sparse

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [N] -> [N, D]"""
        unique, inverse = ids.unique(return_inverse=True)
        table = torch.empty(len(unique), self.config.hidden_size, dtype=self.dtype)
        for start, rows in self._row_chunks("model.embed_tokens.weight"):
            inside = (unique >= start) & (unique < start + len(rows))
            table[inside] = rows[unique[inside] - start].to(self.dtype)
        return table[inverse].to(self.device)

    @torch.no_grad()
    def finish(self, states: torch.Tensor):
        """The last norm, in place: what the output head and the first prediction module read."""
        norm = self._load(self._skeleton.model.norm, "model.norm.")
        for chunk in states.split(_CHUNK):
            chunk.copy_(norm(chunk))

    @torch.no_grad()
    def loss(self, states: torch.Tensor, ids: torch.Tensor, rows: list[slice]) -> float:
        """Mean cross entropy of the next token over some hundred places, nats; `states` as `finish` leaves them."""
        places = torch.cat([torch.arange(row.start, row.stop - 1) for row in rows])
        places = places[torch.linspace(0, len(places) - 1, min(_LOSS_TOKENS, len(places))).long()]
        hidden, targets = states[places.to(states.device)].float(), ids[places + 1].to(states.device)
        name = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        parts = [hidden @ rows.float().to(self.device).T for _, rows in self._row_chunks(name)]
        return F.cross_entropy(torch.cat(parts, dim=-1), targets).item()

    @torch.no_grad()
    def run(
        self,
        index: int,
        states: torch.Tensor,
        ids: torch.Tensor,
        rows: list[slice],
        step: Callable[[], object] = lambda: None,
    ) -> Visits | None:
        """Runs a layer over all tokens and replaces `states` [N, D] in place.

        Args:
            index: the layers of the model come first, then `finish`, then the prediction modules.
            ids: int64 [N].
            rows: where the rows lie; tokens of different rows do not see each other.
            step: called after each routed expert and at the end of the layer.

        Returns:
            what the routed experts did, None for a layer without.
        """
        layer = self._skeleton.model.layers[index]
        self._load(layer, f"model.layers.{index}.", without="mlp.experts.")
        ahead = index - self.config.num_hidden_layers + 1  # of a prediction module: how far it looks
        embeds = self.embed(ids) if ahead > 0 else None
        for row in rows:
            inputs = states[None, row]  # [1, S, D]
            if embeds is not None:
                next_embeds = embeds[None, row].roll(-ahead, dims=1)
                inputs = layer.eh_proj(torch.cat((layer.enorm(next_embeds), layer.hnorm(inputs)), dim=-1))
            model = self._skeleton.model
            visible = model.create_causal_mask(inputs, None, None, None)
            arguments = model.layer_arguments(inputs, visible)[model.layer_kinds[index]]
            arguments.pop("token_mask")
            states[row] = (inputs + layer.self_attn(layer.input_layernorm(inputs), **arguments)[0])[0]
        if layer.is_sparse:
            visits = self._run_experts(index, layer, states, step)
        else:
            visits = None
            for chunk in states.split(_CHUNK):
                chunk += layer.mlp(layer.post_attention_layernorm(chunk))
        layer.to("meta")
        step()
        return visits

    def _run_experts(self, index: int, layer: nn.Module, states: torch.Tensor, step: Callable) -> Visits:
        """Adds the block of experts to `states`, one expert after the other."""
        norm, block = layer.post_attention_layernorm, layer.mlp
        routed = [block.gate(norm(chunk))[1:] for chunk in states.split(_CHUNK)]
        weights = torch.cat([part[0] for part in routed])  # [N, P]
        indices = torch.cat([part[1] for part in routed])
        norms = torch.zeros_like(weights)
        output = torch.zeros_like(states)
        for expert in range(self.config.n_routed_experts):
            slots = (indices.flatten() == expert).nonzero()[:, 0]
            if len(slots):
                gate_proj, up_proj, down_proj = self._expert(index, expert)
            for some in slots.split(_CHUNK) if len(slots) else ():
                token = some // indices.shape[1]
                rows = norm(states[token])  # [n, D]
                inner = block.experts.act_fn(F.linear(rows, gate_proj)) * F.linear(rows, up_proj)
                result = F.linear(inner, down_proj)
                norms.view(-1)[some] = result.float().norm(dim=-1)
                output.index_add_(0, token, result * weights.flatten()[some, None].to(result.dtype))
            step()
        changes = []
        for before, added in zip(states.split(_CHUNK), output.split(_CHUNK), strict=True):
            if block.shared_experts is not None:
                added += block.shared_experts(norm(before))
            after = before + added
            changes.append(1 - F.cosine_similarity(before.float(), after.float(), dim=-1))
            before.copy_(after)
        return Visits(*(part.cpu() for part in (indices, weights, norms, torch.cat(changes))))

    def _expert(self, index: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        prefix = f"model.layers.{index}.mlp.experts."
        if self._own_name(f"{prefix}gate_up_proj") in self._tensors:
            gate_up, down = (self._read(f"{prefix}{name}", expert) for name in ("gate_up_proj", "down_proj"))
            return *gate_up.chunk(2), down
        return tuple(self._read(f"{prefix}{expert}.{name}.weight") for name in ("gate_proj", "up_proj", "down_proj"))

    def _load(self, module: nn.Module, prefix: str, without: str = "\n") -> nn.Module:
        """Gives a module its weights, except those whose names begin with `without`."""
        names = [name for name in module.state_dict() if not name.startswith(without)]
        missing, _ = module.load_state_dict(
            {name: self._read(prefix + name) for name in names}, strict=False, assign=True
        )
        assert all(name.startswith(without) for name in missing), missing
        return module

    def _read(self, name: str, part=...) -> torch.Tensor:
        exact = any(word in name for word in self._exact)
        dtype = torch.float32 if exact else self.dtype
        return self._tensors[self._own_name(name)][part].to(self.device, dtype)

    def _row_chunks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        matrix = self._tensors[self._own_name(name)]
        for start in range(0, matrix.get_shape()[0], _VOCABULARY_CHUNK):
            yield start, matrix[start : start + _VOCABULARY_CHUNK]

    def _own_name(self, name: str) -> str:
        return self.files._own_name(name)


if __name__ == "__main__":
    no_command("prune a checkpoint by python -m compress.prune")
