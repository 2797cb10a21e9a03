"""How fast: V2-Lite in full size and layers as wide as V3's, beside transformers' own class around the same weights.

Weights are random, made on the device. Contestants take turns. Caches are filled with random states, so that no time goes
into prefilling them. "share of bandwidth": the bytes of weights and latents that a step must read, over the bandwidth that
a copy reached on this card, over the step's time; "share of FLOPs" likewise, with the speed of a large product.
"""

import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from importlib.util import find_spec
from statistics import median

import torch
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, DynamicCache
from transformers.generation import CompileConfig

from benchmarks.common import interleave

from .models import Setup, make_pair, published_config
from .runner import Check, NotRun
from .smoke import greedy, number, require

_TURN = 8  # decoded tokens of a turn
_LORA_TARGETS = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
_WORKSPACE = 0.75  # of the free memory that weights may take


def checks(setup: Setup) -> Iterator[Check]:
    """The checks of this part, most telling first."""
    limits = Limits(setup)
    yield Check("limits/of the device", limits.measure, seconds=5)
    lite = Contest(setup, limits, "deepseek_v2_lite", DeepseekV2ForCausalLM)
    yield Check("models/V2-Lite", lite.describe, seconds=20)
    yield from _cases(setup, lite, "V2-Lite")
    yield Check("training with LoRA/V2-Lite", lite.train, seconds=20)
    lite.release()
    wide = Contest(setup, limits, "deepseek_v3", DeepseekV3ForCausalLM)
    yield Check("models/V3 width", wide.describe, seconds=20)
    for case in ((1, 8192), (16, 1024)):
        yield _decode_check(setup, wide, "V3 width", *case)
    yield Check("prefill/V3 width, 4096 tokens", partial(wide.prefill, scaled(setup, 4096)), seconds=10)
    wide.release()


def _cases(setup: Setup, contest: "Contest", name: str) -> Iterator[Check]:
    yield _decode_check(setup, contest, name, 1, 1024)
    yield Check(f"prefill/{name}, 4096 tokens", partial(contest.prefill, scaled(setup, 4096)), seconds=5)
    for case in ((1, 8192), (16, 1024), (64, 1024), (1, 65536), (16, 8192)):
        yield _decode_check(setup, contest, name, *case)
    yield Check(f"generate, compiled/{name}, batch 1", contest.generate_compiled, seconds=60)
    yield Check(f"prefill/{name}, 16384 tokens", partial(contest.prefill, scaled(setup, 16384)), seconds=10)
    yield _decode_check(setup, contest, name, 64, 8192)


def _decode_check(setup: Setup, contest: "Contest", name: str, batch: int, context: int) -> Check:
    run = partial(contest.decode, batch if setup.full else min(batch, 2), scaled(setup, context))
    return Check(f"decode/{name}, batch {batch}, {context} tokens", run, seconds=8 if context < 65536 else 15)


def scaled(setup: Setup, length: int) -> int:
    """A length, or where sizes are tiny one that a CPU can do."""
    return length if setup.full else max(8, length // 512)


class Limits:
    """Bytes and operations a second that the device reaches."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.bandwidth = self.operations = math.nan

    def measure(self) -> dict:
        """Copies a tensor, and multiplies two matrices in bfloat16; the best of ten."""
        count, side = (2**31, 8192) if self.setup.full else (2**16, 64)
        kind = {"device": self.setup.device, "dtype": torch.bfloat16}
        source, target = torch.zeros(count // 2, **kind), torch.empty(count // 2, **kind)
        left, right = torch.randn(side, side, **kind), torch.randn(side, side, **kind)
        turns = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
        seconds = {name: min(times) for name, times in interleave(turns, repeats=10).items()}
        self.bandwidth = 2 * count / seconds["copy"]
        self.operations = 2 * side**3 / seconds["product"]
        return {"GB/s": number(self.bandwidth / 1e9), "TFLOP/s": number(self.operations / 1e12)}


class Contest:
    """Our model and transformers' own, made when first needed."""

    def __init__(self, setup: Setup, limits: Limits, name: str, native_class):
        self.setup, self.limits, self.name, self.native_class = setup, limits, name, native_class

    @cached_property
    def config(self) -> dict:
        """The published one; of V3 with as many layers as fit."""
        if self.name != "deepseek_v3" or not self.setup.full:
            return published_config(self.name, self.setup)
        sizes = [self._bytes(published_config(self.name, self.setup, num_hidden_layers=count)) for count in (4, 5)]
        free = _WORKSPACE * torch.cuda.mem_get_info()[0]
        layers = 4 + int((free - sizes[0]) // (sizes[1] - sizes[0]))
        if layers < 4:
            raise NotRun(f"one sparse layer and the dense ones take {sizes[0] / 1e9:.0f} GB")
        return published_config(self.name, self.setup, num_hidden_layers=layers)

    def _bytes(self, config: dict) -> int:
        from deepseek_repo.configuration_deepseek import DeepseekConfig
        from deepseek_repo.modeling_deepseek import DeepseekForCausalLM

        with torch.device("meta"):
            model = DeepseekForCausalLM(DeepseekConfig(**config))
        return 2 * sum(p.numel() for p in model.parameters())

    @cached_property
    def models(self) -> dict[str, torch.nn.Module]:
        """By name, around the same weights."""
        return make_pair(self.config, self.native_class, self.setup)

    def release(self):
        """Gives the memory back."""
        self.__dict__.pop("models", None)

    @torch.no_grad()
    def describe(self) -> dict:
        """Size, and that both give the same logits."""
        tokens = self._tokens(1, scaled(self.setup, 8192) + 8)
        ours, native = (model(tokens, use_cache=False).logits[0].float() for model in self.models.values())
        error = ((ours - native).norm(dim=-1) / native.norm(dim=-1)).median().item()
        require(error < 0.05, f"logits differ from transformers' by {error:.3g}, the median over tokens")
        parameters = sum(p.numel() for p in self.models["ours"].parameters())
        return {
            "layers": self.config["num_hidden_layers"],
            "parameters": parameters,
            "difference of logits": number(error),
        }

    @torch.no_grad()
    def decode(self, batch: int, context: int) -> dict:
        """Tokens a second of the whole batch, eager, over a dynamic cache."""
        token, steps_of_turn = self._tokens(batch, 1), _TURN if self.setup.full else 1

        def contestant(model) -> Callable[[], None]:
            cache = self._filled_cache(model, batch, context)

            def turn():
                for _ in range(steps_of_turn):
                    model(token, past_key_values=cache, use_cache=True)

            return turn

        seconds, result = self._compete(contestant)
        steps = {name: median(times) / steps_of_turn for name, times in seconds.items()}
        result |= {f"{name} tokens/s": number(batch / step) for name, step in steps.items()}
        result |= self._ratio(steps)
        if "ours" in steps:
            latents = batch * context * (self.config["kv_lora_rank"] + self.config["qk_rope_head_dim"])
            read = 2 * (self._active(batch) + latents * self.config["num_hidden_layers"])
            result["share of bandwidth"] = number(read / steps["ours"] / self.limits.bandwidth)
        return result

    @torch.no_grad()
    def prefill(self, length: int) -> dict:
        """Tokens a second of one prompt."""
        tokens = self._tokens(1, length)
        contestant = lambda model: partial(model, tokens, use_cache=True, logits_to_keep=1)  # noqa: E731
        seconds, result = self._compete(contestant)
        times = {name: median(values) for name, values in seconds.items()}
        result |= {f"{name} tokens/s": number(length / time) for name, time in times.items()}
        result |= self._ratio(times)
        if "ours" in times:
            widths = self.config["qk_nope_head_dim"] + self.config["qk_rope_head_dim"] + self.config["v_head_dim"]
            attention = length**2 * self.config["num_attention_heads"] * widths * self.config["num_hidden_layers"]
            operations = 2 * self._active(1) * length + attention  # half of the pairs, two operations each
            result["share of FLOPs"] = number(operations / times["ours"] / self.limits.operations)
        return result

    @torch.no_grad()
    def generate_compiled(self) -> dict:
        """Tokens a second of `generate` with a static cache, which both compile alike; the prompt's time taken off."""
        tokens, count = self._tokens(1, scaled(self.setup, 4096)), 129 if self.setup.full else 5
        settings = greedy(count) | {"cache_implementation": "static", "min_new_tokens": count}
        if self.setup.device == "cpu":  # of the compiler only what no GPU is needed for
            settings["compile_config"] = compile_config = CompileConfig(backend="eager", mode=None)
            compile_config._compile_all_devices = True

        def contestant(model) -> Callable[[], None]:
            return partial(model.generate, tokens, **settings)

        def first_token(model) -> Callable[[], None]:
            return partial(model, tokens, use_cache=True, logits_to_keep=1)

        try:
            seconds, result = self._compete(contestant)
            prompt, _ = self._compete(first_token)
        finally:
            torch._dynamo.reset()
        steps = {
            name: (median(seconds[name]) - median(prompt[name])) / (count - 1) for name in seconds if name in prompt
        }
        return result | {f"{name} tokens/s": number(1 / step) for name, step in steps.items()} | self._ratio(steps)

    def train(self) -> dict:
        """Tokens a second of steps with adapters of rank 16 on attention: forward, backward, AdamW."""
        if not find_spec("peft"):
            raise NotRun("peft is not installed")
        from peft import LoraConfig, get_peft_model

        tokens = self._tokens(1, scaled(self.setup, 4096))
        adapted = []

        def contestant(model) -> Callable[[], None]:
            adapted.append(get_peft_model(model, LoraConfig(r=16, target_modules=_LORA_TARGETS)).train())
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

            def step():
                model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            return step

        try:
            seconds, result = self._compete(contestant)
        finally:
            for one in adapted:
                one.unload().eval()
        times = {name: median(values) for name, values in seconds.items()}
        return (
            result
            | {f"{name} tokens/s": number(tokens.numel() / time) for name, time in times.items()}
            | self._ratio(times)
        )

    def _compete(self, contestant: Callable) -> tuple[dict[str, list[float]], dict]:
        """Seconds of the turns of those whose memory suffices, and each one's peak; a contestant is made of a model."""
        turns, result = {}, {}
        for name, model in self.models.items():
            try:
                turn = contestant(model)
                if self.setup.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                turn()  # which warms up as well
                if self.setup.device == "cuda":
                    peak = torch.cuda.max_memory_allocated() - before
                    result[f"{name} adds at the peak, GB"] = number(peak / 1e9)
                turns[name] = turn
            except torch.OutOfMemoryError:
                result[f"{name} tokens/s"] = "out of memory"
                torch.cuda.empty_cache()
        if not turns:
            raise NotRun("out of memory")
        return interleave(turns, self.setup.repeats, warmup=0), result

    @staticmethod
    def _ratio(seconds: dict[str, float]) -> dict:
        return {"times faster": number(seconds["transformers"] / seconds["ours"])} if len(seconds) == 2 else {}

    def _tokens(self, batch: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, self.config["vocab_size"], (batch, length), generator=generator).to(self.setup.device)

    def _filled_cache(self, model, batch: int, length: int) -> DynamicCache:
        """A cache of `length` random tokens, of whatever the model keeps there."""
        cache = DynamicCache(config=model.config)
        model(self._tokens(batch, 1), past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.update(
                *(x.new_empty(*x.shape[:2], length - 1, x.shape[-1]).normal_() for x in (layer.keys, layer.values))
            )
        return cache

    def _active(self, tokens: int) -> float:
        """Parameters that a step of so many tokens reads, if each token's experts are chosen evenly."""
        model = self.models["ours"]
        experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
        others = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel() - experts
        left_out = (1 - self.config["num_experts_per_tok"] / self.config["n_routed_experts"]) ** tokens
        return others + experts * (1 - left_out)
