"""One table of tiny configurations, one a family, and models with random weights made from it.

The widths differ from each other wherever the real ones may, so that a mixed-up width is an error and not a
coincidence; MLA's are such that `max_absorbed_tokens` is 7.
"""

import torch

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_MOE = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "aux_loss_alpha": 0.01,
}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 4,
}


def _yarn(mscale: float) -> dict:
    return {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


_V3 = {
    **_COMMON,
    **_MOE,
    **_MLA,
    "model_type": "deepseek_v3",
    "q_lora_rank": 20,
    "n_shared_experts": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_scaling": _yarn(1.0),
    "num_nextn_predict_layers": 1,
}
FAMILIES = {
    "llama": {**_COMMON, "model_type": "llama", "num_key_value_heads": 2},
    "deepseek": {**_COMMON, **_MOE, "model_type": "deepseek", "num_key_value_heads": 4},
    "v2_lite": {**_COMMON, **_MOE, **_MLA, "model_type": "deepseek_v2", "rope_scaling": _yarn(0.707)},
    "v2": {
        **_COMMON,
        **_MOE,
        **_MLA,
        "model_type": "deepseek_v2",
        "q_lora_rank": 20,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
        "rope_scaling": _yarn(1.0),
    },
    "v3": _V3,
    "v32": {**_V3, "model_type": "deepseek_v32", "index_topk": 16, "index_n_heads": 16, "index_head_dim": 12},
    "v3_mtp2": {**_V3, "num_nextn_predict_layers": 2},
    "nsa": {
        **_COMMON,
        **_MOE,
        "model_type": "deepseek_nsa",
        "num_key_value_heads": 2,
        "nsa_compress_block_size": 8,
        "nsa_compress_stride": 4,
        "nsa_select_block_size": 16,
        "nsa_num_select_blocks": 4,
        "nsa_window_size": 12,
    },
    "v3_mtp0": {**_V3, "num_nextn_predict_layers": 0},
}
MAIN_FAMILIES = ("llama", "deepseek", "v2_lite", "v2", "v3")  # without the variations
MOE_FAMILIES = tuple(name for name in MAIN_FAMILIES if "n_routed_experts" in FAMILIES[name])
MLA_FAMILIES = tuple(name for name in MAIN_FAMILIES if "kv_lora_rank" in FAMILIES[name])
MTP_FAMILIES = ("v3", "v3_mtp2")


def make_config(family: str, **overrides):
    from deepseek_repo.configuration_deepseek import DeepseekConfig

    return DeepseekConfig(**{**FAMILIES[family], **overrides})


def make_model(family: str, head: str = "ForCausalLM", attention: str = "sdpa", seed: int = 0, **overrides):
    """A model in eval mode with weights of which none is at a default: a lost weight shows in the logits."""
    from deepseek_repo import modeling_deepseek

    config = make_config(family, **overrides)
    config._attn_implementation = attention
    model = getattr(modeling_deepseek, f"Deepseek{head}")(config)
    randomise(model, seed)
    return model.eval()


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0):
    """Matrices get entries of about 1 / sqrt(inputs), norms lie around 1, biases around 0 but not at it."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "inv_freq" in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("embed_tokens.weight"):
            value = noise
        elif tensor.ndim >= 2:
            value = noise * tensor.shape[-1] ** -0.5
        elif name.endswith("weight"):
            value = 1 + 0.2 * noise
        else:
            value = 0.1 * noise
        tensor.copy_(value)


def make_tokens(batch: int, length: int, vocab_size: int = 128, seed: int = 0) -> torch.Tensor:
    """Random ids [batch, length] without the special ones 0, 1, 2."""
    return torch.randint(3, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
