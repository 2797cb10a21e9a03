"""Configuration of every DeepSeek text model from DeepSeek-LLM to V3 / R1.

`DeepseekConfig` reads the published `config.json` files unchanged and writes them back under the same official names,
`model_type` and `architectures`, so that a checkpoint saved here opens in transformers' native classes and in other
engines. In memory the class carries a `model_type` of its own (see docs/design.md for why).

A model is described by independent axes, each resolved here and never again in the modeling files. What other fields
imply is derived when it is read, so a config may be edited; `validate` looks at the result when a model is built or saved:

    attention_kind    "gqa" (DeepSeek-LLM, DeepSeekMoE); "mla" (V2, V3) where `kv_lora_rank` is set, and "dsa" (V3.2) where
                      `index_topk` is, too; or "nsa" (native sparse attention), which no released checkpoint has:
                      `model_type` "deepseek_nsa" on disk. `attention_kinds` names one for each layer
    mlp_layer_types   "dense" or "sparse" for each layer, from `first_k_dense_replace`, `moe_layer_freq`, `n_routed_experts`
    scoring_func      router scores: "softmax" or "sigmoid"
    topk_method       router selection: "greedy", "group_limited_greedy" or "noaux_tc"
    norm_topk_prob, routed_scaling_factor    router weights
"""

import inspect
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

# What a published family means by a field that its config.json leaves out.
_DENSE = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "kv_lora_rank": None,
    "q_lora_rank": None,
    "qk_nope_head_dim": None,
    "qk_rope_head_dim": None,
    "v_head_dim": None,
    "rope_interleave": False,
    "n_routed_experts": None,
    "n_shared_experts": None,
    "num_experts_per_tok": None,
    "moe_intermediate_size": None,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "aux_loss_alpha": 0.0,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 4096,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}
_MOE = _DENSE | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "aux_loss_alpha": 0.001,
}
_V2 = _MOE | {
    "num_hidden_layers": 27,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
}
_V3 = _V2 | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "aux_loss_alpha": 0.0001,  # V3 technical report, section 4.2; the released file does not say
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_DERIVED = ("num_key_value_heads", "head_dim", "mlp_layer_types")
_V32_INDEXER = {"index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128}
# Native sparse attention on grouped-query attention: no released checkpoint; the paper's sizes.
_NSA_SIZES = {
    "nsa_compress_block_size": 32,
    "nsa_compress_stride": 16,
    "nsa_select_block_size": 64,
    "nsa_num_select_blocks": 16,
    "nsa_num_init_blocks": 1,
    "nsa_num_local_blocks": 2,
    "nsa_window_size": 512,
}
_NSA = _DENSE | {"num_key_value_heads": 4} | _NSA_SIZES
FAMILY_DEFAULTS = {
    "llama": _DENSE,
    "deepseek": _MOE,
    "deepseek_v2": _V2,
    "deepseek_v3": _V3,
    "deepseek_v32": _V3 | _V32_INDEXER,
    "deepseek_nsa": _NSA,
}

_FAMILY_FIELDS = tuple(dict.fromkeys(name for fields in FAMILY_DEFAULTS.values() for name in fields))

# The class names that go with a `model_type` in a published config.json: DeepseekV3ForCausalLM and so on.
_ARCHITECTURE_PREFIX = {
    "llama": "Llama",
    "deepseek": "Deepseek",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "deepseek_v32": "DeepseekV32",
    "deepseek_nsa": "Deepseek",
}
_INDEXER_LEARNING = {"index_loss_weight": 1.0, "index_warmup": False}
_INDEXER_FIELDS = (*_V32_INDEXER, *_INDEXER_LEARNING)
_MLA_SIZES = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MLA_FIELDS = (*_MLA_SIZES, "rope_interleave")
_MOE_FIELDS = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")
_MOE_FIELDS += ("first_k_dense_replace", "moe_layer_freq", "scoring_func", "topk_method", "n_group", "topk_group")
_MOE_FIELDS += ("norm_topk_prob", "routed_scaling_factor", "aux_loss_alpha")
_ATTENTION_KINDS = ("gqa", "mla", "dsa", "nsa")
_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")
_SCORING_FUNCS = ("softmax", "sigmoid")
_TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
_DTYPES = ("auto", "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_LAYER_TYPES = ("full_attention", "indexed_attention")  # transformers' names of cache layers
_MOST_COUNT = 2**24  # of anything; products of such still have a size
_MOST_LAYERS = 10_000  # more is damage, and would fill the memory with empty layers
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_ROPE_TYPES_OF_A_LENGTH = ("yarn", "longrope", "llama3")  # these have an original_max_position_embeddings
_ROPE_THETA = 10000.0
_ROPE_NUMBERS = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_ROPE_NUMBERS += ("attention_factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor")


class _Derived:
    """A field of a config that follows from the others unless it is set; null lets it follow them again."""

    def __init__(self, derive):
        self.derive, self.__doc__ = derive, derive.__doc__

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, config, owner=None) -> Any:
        if config is None:
            return self
        value = config.__dict__.get(self.name)
        return self.derive(config) if value is None else value

    def __set__(self, config, value):
        # under its own name, where transformers looks for what to compare, copy and write
        config.__dict__[self.name] = value
        if value is None:
            del config.__dict__[self.name]

    def __delete__(self, config):
        config.__dict__.pop(self.name, None)


class DeepseekConfig(PreTrainedConfig):
    """Configuration of a DeepSeek model.

    Fields that are not given take the values of the published model of that `model_type`
    (`FAMILY_DEFAULTS`); without a `model_type`, those of DeepSeek-V3. Fields of MLA, of the indexer, of native sparse
    attention and of experts exist only on configs of models that have these, as in the published files: serving engines
    ask `hasattr(config, "index_topk")`.

    Args:
        vocab_size: rows of the embedding matrix.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the dense MLPs.
        num_hidden_layers: decoder layers, the multi-token-prediction modules not counted.
        num_attention_heads: query heads H.
        num_key_value_heads: key/value heads of GQA; `None` means one for each query head.
        head_dim: width of a GQA head; `None` means hidden_size / num_attention_heads. For MLA it is the rotated width.
        kv_lora_rank: width C of MLA's key/value latent; `None` selects GQA.
        q_lora_rank: width of MLA's query latent; `None` means an uncompressed query projection.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: MLA's widths per head Dn, Dr, Dv.
        rope_interleave: rotate pairs (2i, 2i+1) as DeepSeek's MLA does, rather than (i, i + D/2) as Llama does.
        rope_parameters: RoPE's `rope_theta`, `rope_type` and the rest; the published `rope_theta` and `rope_scaling`
            are accepted and written back.
        max_position_embeddings: longest context the model was made for, in tokens.
        n_routed_experts: routed experts of a sparse layer; `None` makes every layer dense.
        n_shared_experts: shared experts, run as one MLP of n_shared_experts * moe_intermediate_size.
        num_experts_per_tok: routed experts that each token visits.
        moe_intermediate_size: inner width of one expert.
        first_k_dense_replace, moe_layer_freq: layer i is sparse if i >= first_k_dense_replace and
            i % moe_layer_freq == 0.
        scoring_func: router scores, "softmax" or "sigmoid".
        topk_method: router selection, "greedy", "group_limited_greedy" (V2) or "noaux_tc" (V3).
        n_group, topk_group: groups of experts, and how many of them a token may visit.
        norm_topk_prob: divide the chosen scores by their sum.
        routed_scaling_factor: factor on the routing weights.
        aux_loss_alpha: weight of the sequence-wise balance loss in training; 0 turns it off.
        num_nextn_predict_layers: multi-token-prediction modules, stored as layers num_hidden_layers, ...
        mtp_loss_weight: weight of the multi-token-prediction loss in training (V3 report: 0.3, later 0.1).
        index_topk: tokens that the indexer of an MLA model selects for each query (V3.2); `None` means all, no indexer.
        index_n_heads, index_head_dim: the indexer's heads and their width.
        index_loss_weight: weight in training of the indexer's loss, KL(attention || index scores); 0 turns it off.
        index_warmup: attend to all tokens and let the indexer learn from that (the first stage of its training).
        nsa_compress_block_size, nsa_compress_stride: tokens of a compressed block (the paper's l), and from one to the
            next (d). These and the following for `attention_kind` "nsa" only.
        nsa_select_block_size, nsa_num_select_blocks: tokens of a selected block (l'), and how many a query reads (n).
        nsa_num_init_blocks, nsa_num_local_blocks: of these, the first ones of a document and the last ones up to the
            query's own, which are always read.
        nsa_window_size: last tokens, the query's own counted, that the window branch reads (w).
        attention_bias: biases in the attention projections that have them in the published code.
        attention_dropout: dropout on attention probabilities.
        hidden_act, rms_norm_eps, initializer_range, use_cache, tie_word_embeddings: as in transformers.
        mlp_bias: accepted from Llama configs; must be false, DeepSeek has no such biases.
        separate_experts: how experts lie in memory: as one module each, which libraries that quantise Linear layers see, or
            stacked. `None`: as modules where weights are quantised. Not saved, the files are the same.

    Raises:
        ValueError: for a combination that no DeepSeek model can have; it names the field, its value, what is allowed
            and the remedy.
    """

    # Not one of the published types, on purpose: PEFT rewrites LoRA targets by the type of a config in memory, and
    # its rules for "deepseek_v3" lose the shared experts and the dense layers. config.json gets the published type.
    model_type = "deepseek_hub"
    # what a Trainer does not take for predictions; the cache has two names, by the release of transformers
    keys_to_ignore_at_inference = ["past_key_values", "cache", "lm_loss", "mtp_loss", "aux_loss", "index_loss"]
    attribute_map = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_ep_plan: ClassVar[Any] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_tp_plan = {
        # GQA; of these, MLA has o_proj and (without query compression) q_proj
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        # MLA: heads are split, the latents are not (the style sums the gradient of the shared rotated key)
        "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        "layers.*.self_attn.q_b_proj": "colwise",
        "layers.*.self_attn.kv_b_proj": "colwise",
        # NSA: as GQA, a group of heads with its key/value head
        "layers.*.self_attn.compress_k_proj": "colwise",
        "layers.*.self_attn.compress_v_proj": "colwise",
        "layers.*.self_attn.select_k_proj": "colwise",
        "layers.*.self_attn.select_v_proj": "colwise",
        "layers.*.self_attn.window_k_proj": "colwise",
        "layers.*.self_attn.window_v_proj": "colwise",
        "layers.*.self_attn.branch_gate": "colwise",
        # held whole, but each process applies them to its own key/value heads
        "layers.*.self_attn.compress_key": "replicated_with_grad_allreduce",
        "layers.*.self_attn.compress_key.up_proj": "replicated_with_grad_allreduce",
        "layers.*.self_attn.compress_key.down_proj": "replicated_with_grad_allreduce",
        "layers.*.self_attn.compress_value": "replicated_with_grad_allreduce",
        "layers.*.self_attn.compress_value.up_proj": "replicated_with_grad_allreduce",
        "layers.*.self_attn.compress_value.down_proj": "replicated_with_grad_allreduce",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }

    def __init__(
        self,
        checkpoint_model_type: str | None = None,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        mlp_bias: bool = False,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = None,
        mtp_loss_weight: float = 0.3,
        index_loss_weight: float = 1.0,
        index_warmup: bool = False,
        separate_experts: bool | None = None,
        rope_parameters: dict | None = None,
        rope_scaling: dict | None = None,
        rope_theta: float | None = None,
        **kwargs,
    ):
        published_type = kwargs.pop("model_type", None)
        if published_type != self.model_type:
            checkpoint_model_type = checkpoint_model_type or published_type
        self.checkpoint_model_type = checkpoint_model_type or "deepseek_v3"
        _check_choice("model_type", self.checkpoint_model_type, tuple(FAMILY_DEFAULTS))
        for name, default in FAMILY_DEFAULTS[self.checkpoint_model_type].items():
            if name not in _DERIVED:
                setattr(self, name, kwargs.pop(name, default))
        for name in (*_V32_INDEXER, *_NSA_SIZES):  # on top of another family
            if name in kwargs:
                setattr(self, name, kwargs.pop(name))

        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.mlp_bias = mlp_bias
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.mtp_loss_weight = mtp_loss_weight
        self.index_loss_weight = index_loss_weight
        self.index_warmup = index_warmup
        self.separate_experts = separate_experts
        self.attention_kind = kwargs.pop("attention_kind", None)
        family = FAMILY_DEFAULTS[self.checkpoint_model_type]
        given = {name: kwargs.pop(name, family.get(name)) for name in _DERIVED}
        self.rope_parameters = _resolve_rope(rope_parameters, rope_scaling, rope_theta, self.max_position_embeddings)
        self._settle()
        self._validate_fields()
        for name, value in given.items():
            # A file cannot say whether a value was chosen; one that follows from the other fields keeps following them.
            if value and value != getattr(self, name):
                setattr(self, name, value)
        if self.has_latent:
            del self.head_dim  # an alias of qk_rope_head_dim here
        self._validate_fields()
        _validate_common(kwargs, self.num_hidden_layers)
        self._validate_combinations()

        # Left over: what transformers knows (architectures, dtype, ...) and what a checkpoint carries besides.
        kwargs.pop("qk_head_dim", None)
        kwargs.pop(
            "layer_types", None
        )  # says nothing that the other fields do not, and would outlive an edit of theirs
        kwargs |= {"bos_token_id": self.bos_token_id, "eos_token_id": self.eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(**kwargs, tie_word_embeddings=tie_word_embeddings)  # pyrefly: ignore[unexpected-keyword]  # fields

    def validate(self):
        """Looks at the fields as they are now: models call it when they are built, and `save_pretrained` before it writes.

        Raises:
            ValueError: as the constructor does.
        """
        self._settle()
        self._validate_fields()
        _validate_common(vars(self), self.num_hidden_layers)
        self._validate_combinations()

    def _settle(self):
        """Gives the config the fields of its kind of model, and takes those of the other kinds away."""
        if self.has_indexer and self.checkpoint_model_type != "deepseek_nsa":
            self.checkpoint_model_type = "deepseek_v32"
        family = FAMILY_DEFAULTS[self.checkpoint_model_type]
        has = {
            _MLA_FIELDS: getattr(self, "kv_lora_rank", None) is not None,
            _MOE_FIELDS: getattr(self, "n_routed_experts", None) is not None,
            _INDEXER_FIELDS: self.checkpoint_model_type == "deepseek_v32",
            tuple(_NSA_SIZES): self.checkpoint_model_type == "deepseek_nsa",
        }
        for names, belongs in has.items():
            switch = names[0]
            for name in names:
                if belongs and not hasattr(self, name):
                    setattr(self, name, (family | _INDEXER_LEARNING).get(name))
                elif not belongs and hasattr(self, name) and (name != switch or family.get(name) is None):
                    delattr(self, name)
        self._fill_nulls()
        self.rope_parameters = _resolve_rope(self.rope_parameters, None, None, self.max_position_embeddings)

    def _fill_nulls(self):
        """What published files mean by null: one group, no scaling, no such modules."""
        self.num_nextn_predict_layers = self.num_nextn_predict_layers or 0
        if getattr(self, "n_routed_experts", None) is None:
            return
        self.n_group = 1 if self.n_group is None else self.n_group
        self.topk_group = self.n_group if self.topk_group is None else self.topk_group
        self.routed_scaling_factor = 1.0 if self.routed_scaling_factor is None else self.routed_scaling_factor
        self.n_shared_experts = self.n_shared_experts or 0
        if self.topk_method == "gready":  # the spelling of the first V2 files
            self.topk_method = "greedy"

    @_Derived
    def num_key_value_heads(self) -> int:
        """Key/value heads of GQA: one for each query head unless given."""
        return self.num_attention_heads

    @_Derived
    def head_dim(self) -> int:
        """Width of a GQA head. For MLA it is what transformers' RoPE functions read as such: the rotated width."""
        if self.has_latent:
            return self.qk_rope_head_dim
        return self.hidden_size // self.num_attention_heads

    @_Derived
    def mlp_layer_types(self) -> list[str]:
        """The MLP of each layer, "dense" or "sparse"."""
        if getattr(self, "n_routed_experts", None) is None:
            return ["dense"] * self.num_hidden_layers
        return [
            "sparse" if i >= self.first_k_dense_replace and i % self.moe_layer_freq == 0 else "dense"
            for i in range(self.num_hidden_layers)
        ]

    @property
    def attention_kind(self) -> str:
        """ "gqa", "mla", "dsa" or "nsa"; to be set to "nsa", on top of any family without a latent."""
        if self.checkpoint_model_type == "deepseek_nsa":
            return "nsa"
        if not self.has_latent:
            return "gqa"
        return "dsa" if self.has_indexer else "mla"

    @attention_kind.setter
    def attention_kind(self, kind: str | None):
        if kind is None:
            return
        _check_choice("attention_kind", kind, _ATTENTION_KINDS)
        if kind == "nsa":
            self.checkpoint_model_type = "deepseek_nsa"
        elif kind != self.attention_kind:
            raise ValueError(
                f"`attention_kind` is {kind!r}, but the other fields make it {self.attention_kind!r}; for 'mla' set "
                "`kv_lora_rank`, for 'dsa' `index_topk` too, for 'gqa' set them to null and take a `model_type` other than "
                "'deepseek_nsa'."
            )

    @property
    def attention_kinds(self) -> list[str]:
        """The kind of attention of each layer, the prediction modules counted on behind the others."""
        return [self.attention_kind] * (self.num_hidden_layers + self.num_nextn_predict_layers)

    @property
    def has_latent(self) -> bool:
        """Whether keys and values come from a latent (MLA), of width `kv_lora_rank`."""
        return getattr(self, "kv_lora_rank", None) is not None and self.checkpoint_model_type != "deepseek_nsa"

    @property
    def has_indexer(self) -> bool:
        """Whether an indexer selects `index_topk` tokens for each query (V3.2)."""
        return getattr(self, "index_topk", None) is not None

    @property
    def rope_theta(self) -> float:
        """The base of RoPE's frequencies, of `rope_parameters`."""
        return self.rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float):
        self.rope_parameters = {**self.rope_parameters, "rope_theta": value}

    @property
    def rope_scaling(self) -> dict:
        """The published name of `rope_parameters`; to be set to a dict without `rope_theta`, which then stays."""
        return self.rope_parameters

    @rope_scaling.setter
    def rope_scaling(self, value: dict | None):
        self.rope_parameters = _resolve_rope(None, value, self.rope_theta, self.max_position_embeddings)

    def _validate_fields(self):
        """Raises a ValueError for the first field whose value is none at all."""
        counts = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        counts += ["num_key_value_heads"]
        if self.has_latent:
            counts += [name for name in _MLA_SIZES if name != "q_lora_rank" or self.q_lora_rank is not None]
        elif "head_dim" in vars(self):
            counts += ["head_dim"]
        if self.checkpoint_model_type == "deepseek_nsa":
            for name in _NSA_SIZES:
                _check_count(name, getattr(self, name), minimum=int(name != "nsa_num_init_blocks"), maximum=2**16)
        experts = getattr(self, "n_routed_experts", None) is not None
        numbers = ["mtp_loss_weight", "rms_norm_eps", "initializer_range"]
        flags = ["attention_bias", "tie_word_embeddings", "use_cache"]
        if experts:
            counts += [
                "moe_layer_freq",
                "n_routed_experts",
                "num_experts_per_tok",
                "moe_intermediate_size",
                "n_group",
                "topk_group",
            ]
        for name in counts:
            _check_count(name, getattr(self, name), minimum=1)
        _check_count("max_position_embeddings", self.max_position_embeddings, minimum=1, maximum=2**31 - 1)
        for name in ("num_hidden_layers", "num_nextn_predict_layers"):
            _check_count(name, getattr(self, name), minimum=0, maximum=_MOST_LAYERS)
        if experts:
            for name in ("first_k_dense_replace", "n_shared_experts"):
                _check_count(name, getattr(self, name), minimum=0)
            numbers += ["aux_loss_alpha", "routed_scaling_factor"]
            flags += ["norm_topk_prob"]
        if self.has_latent:
            flags += ["rope_interleave"]
        if self.has_indexer:
            numbers += ["index_loss_weight"]
            flags += ["index_warmup"]
        for name in numbers:
            _check_number(name, getattr(self, name))
        _check_number("attention_dropout", self.attention_dropout, maximum=1)
        _check_choice("hidden_act", self.hidden_act, _ACTIVATIONS)
        for name in flags:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be true or false.")
        self._validate_token_ids()
        if self.mlp_bias:
            raise ValueError("`mlp_bias` is true; DeepSeek MLPs have no biases. Set it to false.")

    def _validate_token_ids(self):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            ids = value if name == "eos_token_id" and isinstance(value, list) else [] if value is None else [value]
            if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 2**31 for i in ids):
                several = ", a list of such" if name == "eos_token_id" else ""
                raise ValueError(f"`{name}` is {value!r}; it must be a token's number from 0 on{several}, or null.")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"`pad_token_id` is {self.pad_token_id}, but `vocab_size` is {self.vocab_size}; choose a token that the "
                "model has, or null."
            )

    def _validate_combinations(self):
        """Raises a ValueError for the first combination that no DeepSeek model can have."""
        if self.checkpoint_model_type == "deepseek_nsa":
            self._validate_nsa()
        if self.checkpoint_model_type == "deepseek_v32":
            self._validate_indexer()
        if not self.has_latent and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` is {self.num_key_value_heads}, which does not divide `num_attention_heads` "
                f"({self.num_attention_heads}); choose a divisor."
            )
        if self.head_dim % 2 or not self.head_dim:
            name = "qk_rope_head_dim" if self.has_latent else "head_dim"
            raise ValueError(
                f"`{name}` is {self.head_dim}; RoPE turns pairs of numbers, so choose an even width from 2 on."
            )
        if not isinstance(self.mlp_layer_types, list) or len(self.mlp_layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`mlp_layer_types` is {self.mlp_layer_types!r} for {self.num_hidden_layers} layers; give a list with "
                "'dense' or 'sparse' for each layer, or leave the field out."
            )
        for kind in self.mlp_layer_types:
            _check_choice("mlp_layer_types", kind, ("dense", "sparse"))
        if "sparse" in self.mlp_layer_types and getattr(self, "n_routed_experts", None) is None:
            raise ValueError("`mlp_layer_types` has 'sparse' layers but `n_routed_experts` is null; set it.")
        if getattr(self, "n_routed_experts", None) is not None:
            self._validate_router()
        _validate_rope(self.rope_parameters, self.head_dim)

    def _validate_indexer(self):
        for name in _V32_INDEXER:
            _check_count(name, getattr(self, name), minimum=1)
        for name in ("kv_lora_rank", "q_lora_rank"):
            if getattr(self, name, None) is None:
                raise ValueError(
                    f"`{name}` is null, but an indexer (`index_topk`) works on MLA with a query latent; set it."
                )
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(
                f"`index_head_dim` is {self.index_head_dim}, less than `qk_rope_head_dim` ({self.qk_rope_head_dim}), "
                "the part that is rotated; choose at least that."
            )
        if self.attention_dropout:
            raise ValueError(
                f"`attention_dropout` is {self.attention_dropout}; sparse attention has no dropout. Set it to 0."
            )

    def _validate_nsa(self):
        for name in ("nsa_compress_block_size", "nsa_select_block_size"):
            if getattr(self, name) % self.nsa_compress_stride:
                raise ValueError(
                    f"`nsa_compress_stride` is {self.nsa_compress_stride}, which does not divide `{name}` "
                    f"({getattr(self, name)}); choose a divisor of both block sizes."
                )
        if self.nsa_compress_block_size > self.nsa_select_block_size:
            raise ValueError(
                f"`nsa_compress_block_size` is {self.nsa_compress_block_size}, more than `nsa_select_block_size` "
                f"({self.nsa_select_block_size}); selection scores are sums of compressed ones, so choose at most that."
            )
        fixed = self.nsa_num_init_blocks + self.nsa_num_local_blocks
        if self.nsa_num_select_blocks < fixed:
            raise ValueError(
                f"`nsa_num_select_blocks` is {self.nsa_num_select_blocks}, less than the {fixed} blocks that are always "
                "selected (`nsa_num_init_blocks` + `nsa_num_local_blocks`); choose more."
            )
        if getattr(self, "kv_lora_rank", None) is not None:
            raise ValueError("`kv_lora_rank` is set, but `attention_kind` 'nsa' has no latent; set it to null.")
        if self.attention_dropout:
            raise ValueError(
                f"`attention_dropout` is {self.attention_dropout}; sparse attention has no dropout. Set it to 0."
            )

    def _validate_router(self):
        _check_choice("scoring_func", self.scoring_func, _SCORING_FUNCS)
        _check_choice("topk_method", self.topk_method, _TOPK_METHODS)
        if self.topk_method == "greedy":
            reachable = self.n_routed_experts
        else:
            if self.n_routed_experts % self.n_group:
                raise ValueError(
                    f"`n_group` is {self.n_group}, which does not divide `n_routed_experts` "
                    f"({self.n_routed_experts}); choose a divisor."
                )
            if self.topk_group > self.n_group:
                raise ValueError(
                    f"`topk_group` is {self.topk_group}, more than the {self.n_group} groups of `n_group`; "
                    f"choose at most {self.n_group}."
                )
            group_size = self.n_routed_experts // self.n_group
            if self.topk_method == "noaux_tc" and group_size < 2:
                raise ValueError(
                    f"`n_group` is {self.n_group}, one expert a group, but `topk_method` 'noaux_tc' ranks groups by "
                    f"the sum of their two best experts; choose at most {self.n_routed_experts // 2} groups."
                )
            reachable = group_size * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"`num_experts_per_tok` is {self.num_experts_per_tok}, but a token can reach only {reachable} "
                f"experts (of `n_routed_experts`, in `topk_group` of `n_group` groups); choose at most {reachable}."
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: Dn + Dr for MLA, head_dim for GQA."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.has_latent else self.head_dim

    @property
    def mtp_layer_type(self) -> str:
        """MLP kind of the multi-token-prediction modules: sparse wherever the model has experts."""
        return "dense" if getattr(self, "n_routed_experts", None) is None else "sparse"

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        try:
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (TypeError, AttributeError, ValueError, RecursionError) as error:
            config_dict, reason = None, error
        else:
            reason = None
        if not isinstance(config_dict, dict):
            raise ValueError(
                f"The config.json of {pretrained_model_name_or_path} is not a JSON object with the fields of a model; "
                "download it again."
            ) from reason
        # Moved aside before transformers compares it with ours and warns about a mismatch.
        if "model_type" in config_dict:
            config_dict["checkpoint_model_type"] = config_dict.pop("model_type")
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers; fields given besides are checked together, also those that the file's family lacks."""
        fields = {"attention_kind", "mlp_layer_types", *_FAMILY_FIELDS, *inspect.signature(cls.__init__).parameters}
        edits = {name: kwargs.pop(name) for name in fields & kwargs.keys()}
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.update(edits)
        config.validate()
        return loaded

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        self.validate()  # before a folder is made, and in every release of transformers
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def __eq__(self, other) -> bool:
        # transformers makes a dataclass of this class, which would compare its own fields only
        return self.__class__.__name__ == other.__class__.__name__ and vars(self) == vars(other)

    def to_dict(self) -> dict:
        """The published form: official names only, with the checkpoint's own `model_type` and `architectures`."""
        output = super().to_dict()
        output["model_type"] = output.pop("checkpoint_model_type", self.checkpoint_model_type)
        if output.get("architectures"):
            prefix = _ARCHITECTURE_PREFIX[self.checkpoint_model_type]
            output["architectures"] = [_publish_architecture(name, prefix) for name in output["architectures"]]

        for name in ("mlp_bias", "separate_experts"):
            output.pop(name, None)
        if output.get("mlp_layer_types") == type(self).mlp_layer_types.derive(self):
            output.pop("mlp_layer_types")
        output["num_key_value_heads"] = self.num_key_value_heads
        output["head_dim"] = self.head_dim
        if self.has_latent:
            output.pop("head_dim")  # an alias of qk_rope_head_dim here
        rope = dict(output.pop("rope_parameters"))
        rope_type, rope_theta = rope.pop("rope_type"), rope.pop("rope_theta")
        # `Trainer` resumes by a plain PreTrainedConfig, which fails on files with both `rope_theta` and a scaling that has
        # an original length. The theta of all published models is what every reader takes where there is none.
        if rope_theta != _ROPE_THETA or rope_type not in _ROPE_TYPES_OF_A_LENGTH:
            output["rope_theta"] = rope_theta
        output["rope_scaling"] = None if rope_type == "default" else {"type": rope_type, **rope}
        return output

    def to_diff_dict(self) -> dict:
        output = super().to_diff_dict()
        if "dtype" in output:
            output["torch_dtype"] = output.pop("dtype")  # the published name, which all readers know
        for name in ("kv_lora_rank", "n_routed_experts"):
            if getattr(self, name, None) is None and FAMILY_DEFAULTS[self.checkpoint_model_type].get(name):
                output[name] = None  # absent, it would be read as the family's number
        return output


def _publish_architecture(name: str, prefix: str) -> str:
    """DeepseekForCausalLM -> DeepseekV3ForCausalLM; a name that already is a published one stays."""
    heads = ("ForCausalLM", "ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification")
    for head in ("Model", *heads):
        if name == f"Deepseek{head}":
            return prefix + head
    return name


def _resolve_rope(parameters: dict | None, scaling: dict | None, theta: float | None, max_positions: int) -> dict:
    """One dict in transformers' form from it, or from the published `rope_scaling` and `rope_theta`."""
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"`{name}` is {value!r}; give a dict such as {{'type': 'yarn', 'factor': 40}}, or null.")
    rope = dict(parameters or scaling or {})
    old_name = rope.pop("type", None)
    rope.setdefault("rope_type", old_name or "default")
    rope.setdefault("rope_theta", _ROPE_THETA if theta is None else theta)
    if rope["rope_type"] in _ROPE_TYPES_OF_A_LENGTH:
        rope.setdefault("original_max_position_embeddings", max_positions)
    return rope


def _validate_rope(rope: dict, width: int):
    """Checks RoPE's parameters for heads of which `width` numbers are rotated."""
    kind = rope["rope_type"]
    _check_choice("rope_scaling.type", kind, _ROPE_TYPES)
    _check_number("rope_theta", rope["rope_theta"], minimum=2)
    if kind in ("yarn", "linear", "dynamic", "llama3"):
        # the ratio of the extended to the original context
        _check_number(f"rope_scaling.factor (of type {kind!r})", rope.get("factor"), minimum=1)
    for name in _ROPE_NUMBERS:
        if rope.get(name) is not None:
            _check_number(f"rope_scaling.{name}", rope[name])
    if kind in _ROPE_TYPES_OF_A_LENGTH:
        name = "original_max_position_embeddings"
        _check_number(f"rope_scaling.{name} (of type {kind!r})", rope.get(name), minimum=1)
    if kind == "llama3":
        low: Any = rope.get("low_freq_factor")
        high: Any = rope.get("high_freq_factor")
        _check_number("rope_scaling.low_freq_factor (of type 'llama3')", low, minimum=1e-6)
        _check_number("rope_scaling.high_freq_factor (of type 'llama3')", high, minimum=1e-6)
        if low >= high:
            raise ValueError(
                f"`rope_scaling.low_freq_factor` is {low}, not less than `rope_scaling.high_freq_factor` ({high}); choose "
                "a smaller one, such as 1 and 4."
            )
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            factors = rope.get(name)
            if not isinstance(factors, list) or len(factors) != width // 2:
                raise ValueError(
                    f"`rope_scaling.{name}` is {factors!r}; type 'longrope' needs a list of {width // 2} numbers, one for "
                    "each rotated pair. Add it, or choose another type."
                )
            for factor in factors:
                _check_number(f"rope_scaling.{name}", factor, minimum=1e-6)
    if kind == "dynamic" and width < 4:
        raise ValueError(
            f"`rope_scaling.type` is 'dynamic', but only {width} numbers of a head are rotated; choose a wider head (4 "
            "or more), or another type."
        )


def _validate_common(fields: dict, num_layers: int):
    """Checks the fields that are transformers' own, which it takes without a look and stumbles over later."""
    for name in ("dtype", "torch_dtype"):
        if isinstance(fields.get(name), str) or type(fields.get(name)).__name__ not in ("NoneType", "dtype"):
            _check_choice(name, fields[name], _DTYPES)
    for name in ("architectures", "layer_types"):
        value = fields.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(entry, str) for entry in value)):
            raise ValueError(f"`{name}` is {value!r}; it must be a list of names, or null.")
    layer_types = fields.get("layer_types")
    if layer_types is not None:
        if len(layer_types) != num_layers:
            raise ValueError(
                f"`layer_types` has {len(layer_types)} entries for {num_layers} layers; leave the field out."
            )
        for entry in layer_types:
            _check_choice("layer_types", entry, _LAYER_TYPES)
    quantization = fields.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict) and not hasattr(quantization, "to_dict"):
        raise ValueError(f"`quantization_config` is {quantization!r}; it must be an object, or null.")
    if "num_labels" in fields:
        _check_count("num_labels", fields["num_labels"], minimum=1, maximum=10**6)
    labels = fields.get("id2label")
    if labels is not None and not (isinstance(labels, dict) and all(str(key).isdecimal() for key in labels)):
        raise ValueError(f"`id2label` is {labels!r}; it must name labels by their numbers, or be null.")


def _check_count(name: str, value, minimum: int, maximum: int = _MOST_COUNT):
    # bool is an int to Python, but `true` as a size is a mistake
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        limit = "" if maximum > _MOST_COUNT else f" and at most {maximum}"
        raise ValueError(f"`{name}` is {value!r}; it must be a whole number of at least {minimum}{limit}.")


def _check_number(name: str, value, minimum: float = 0, maximum: float = 1e12):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value <= maximum:
        raise ValueError(f"`{name}` is {value!r}; it must be a number from {minimum} to {maximum:g}.")


def _check_choice(name: str, value, allowed: tuple):
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


__all__ = ["DeepseekConfig"]
