"""Whether it works on a GPU at all: every family, kernel and way to generate, against float32 on the CPU.

Models have the same weights on both sides, numbers that bfloat16 can hold. Errors are those of a token's logits, the norm
of the difference over the norm of the reference. In bfloat16 a router may choose another expert for a token, whose error
is then large; so the median over tokens counts there, and the largest in float32.
"""

import copy
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import CompileConfig

from benchmarks.common import ROOT

from .models import FAMILIES, Setup, make_family, make_tokens
from .runner import Check, NotRun

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2}
GRADIENT_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 1e-1}


def checks(setup: Setup) -> Iterator[Check]:
    """The checks of this part, most telling first."""
    for family in FAMILIES:
        yield Check(f"family/{family}", partial(check_family, setup, family), seconds=3)
    yield Check("kernels/nsa forward and backward", partial(check_nsa_kernels, setup), seconds=5)
    yield Check("kernels/dsa", partial(check_dsa_kernels, setup), seconds=5)
    for cache in ("dynamic", "static", "compiled"):
        for family in ("llama", "v3"):
            yield Check(f"generate/{family}, {cache}", partial(check_generate, setup, family, cache), seconds=5)
    for family in ("v32", "nsa"):
        yield Check(f"generate/{family}, dynamic", partial(check_generate, setup, family, "dynamic"), seconds=5)
    yield Check("generate/v3, drafts of its prediction module", partial(check_drafts, setup), seconds=3)
    yield Check("generate/the root checkpoint", partial(check_root, setup), seconds=5)
    for attention in ("eager", "sdpa", "flash_attention_2", "flex_attention"):
        for family in ("llama", "v3"):
            yield Check(
                f"attention/{family}, {attention}", partial(check_attention, setup, family, attention), seconds=5
            )
    for experts in ("eager", "batched_mm", "grouped_mm"):
        yield Check(f"experts/v3, {experts}", partial(check_experts, setup, experts), seconds=3)
    yield Check("training/LoRA", partial(check_lora, setup), seconds=5)
    yield Check("fp8/v3, kept against dequantised", partial(check_fp8, setup), seconds=10)


def check_family(setup: Setup, family: str) -> dict:
    """Logits in both dtypes, decoding token by token, and gradients."""
    model, tokens = make_family(family, setup), make_tokens(setup)
    with torch.no_grad():
        expected = model(tokens).logits
    result = {}
    for dtype in (torch.float32, torch.bfloat16):
        # an indexer, too, chooses otherwise in bfloat16
        tolerance = 0.1 if (family, dtype) == ("v32", torch.bfloat16) else None
        on_device = put(model, setup, dtype)
        with torch.no_grad():
            logits = on_device(tokens.to(setup.device), use_cache=False).logits
            result |= compare(logits, expected, "logits", tolerance=tolerance)
            decoded = decode(on_device, tokens.to(setup.device))
            result |= compare(decoded, expected, "decoded", tolerance=tolerance)
    result |= compare_gradients(model, put(model, setup, torch.float32), tokens)
    return result


def check_attention(setup: Setup, family: str, attention: str) -> dict:
    """A kernel of the attention interface in bfloat16; without padding and with it."""
    if attention == "flash_attention_2" and (setup.device != "cuda" or not find_spec("flash_attn")):
        raise NotRun("flash_attn is not installed, or there is no GPU")
    if attention == "flex_attention" and setup.device == "cpu":
        raise NotRun("compiles for half a minute on a CPU; tests/contract/test_every_family.py runs it there")
    reference, tokens = make_family(family, setup, attention="eager"), make_tokens(setup)
    model = put(reference, setup, torch.bfloat16)
    model.set_attn_implementation(attention)
    mask = torch.ones_like(tokens)
    mask[1, :11] = 0
    result = {}
    with torch.no_grad():
        for name, given in (("whole", None), ("padded", mask)):
            on_device = None if given is None else given.to(setup.device)
            logits = model(tokens.to(setup.device), attention_mask=on_device, use_cache=False).logits
            real = mask.bool() if given is not None else torch.ones_like(mask).bool()
            expected = reference(tokens, attention_mask=given, use_cache=False).logits
            result |= compare(logits.cpu()[real], expected[real], name)
    return result


def check_experts(setup: Setup, experts: str) -> dict:
    """An implementation of the experts interface, logits and gradients."""
    model, tokens = make_family("v3", setup), make_tokens(setup)
    result = {}
    for dtype in (torch.float32, torch.bfloat16):
        on_device = put(model, setup, dtype, experts=experts)
        with torch.no_grad():
            result |= compare(on_device(tokens.to(setup.device)).logits, model(tokens).logits, "logits")
    return result | compare_gradients(model, put(model, setup, torch.float32, experts=experts), tokens)


def check_generate(setup: Setup, family: str, cache: str) -> dict:
    """Greedy tokens in float32 are the CPU's; in bfloat16 it runs."""
    model, tokens = make_family(family, setup), make_tokens(setup, length=24)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    settings = greedy(12)
    expected = model.generate(tokens, attention_mask=mask, **settings)
    if cache != "dynamic":
        settings |= {"cache_implementation": "static", "disable_compile": cache == "static"}
    if cache == "compiled" and setup.device == "cpu":  # of the compiler only what no GPU is needed for
        settings["compile_config"] = compile_config = CompileConfig(backend="eager", mode=None)
        compile_config._compile_all_devices = True
    inputs = {"attention_mask": mask.to(setup.device), **settings}
    try:
        tokens_of = {
            dtype: put(model, setup, dtype).generate(tokens.to(setup.device), **inputs).cpu()
            for dtype in (torch.float32, torch.bfloat16)
        }
    finally:
        torch._dynamo.reset()
    require(torch.equal(tokens_of[torch.float32], expected), f"tokens {tokens_of[torch.float32]}, expected {expected}")
    return {"equal in bfloat16": share_of_equal(tokens_of[torch.bfloat16], expected)}


def check_drafts(setup: Setup) -> dict:
    """Speculative decoding gives the tokens of plain decoding."""
    model = put(make_family("v3", setup), setup, torch.float32)
    tokens = make_tokens(setup, length=24).to(setup.device)
    expected = model.generate(tokens, **greedy(24))
    output = model.generate(tokens, mtp_tokens=2, return_dict_in_generate=True, **greedy(24))
    require(torch.equal(output.sequences, expected), f"tokens {output.sequences}, expected {expected}")
    half = put(model, setup, torch.bfloat16).generate(tokens, mtp_tokens=2, **greedy(24))
    return {"rounds": output.rounds, "equal in bfloat16": share_of_equal(half, expected)}


def check_root(setup: Setup) -> dict:
    """The checkpoint in the root as a user loads it, in bfloat16, on a sentence."""
    load = partial(AutoModelForCausalLM.from_pretrained, ROOT, trust_remote_code=True)
    tokens = AutoTokenizer.from_pretrained(ROOT)("The history of the railway began", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = load(dtype=torch.float32).eval()(tokens).logits
        model = load(dtype=torch.bfloat16).eval().to(setup.device)
        result = compare(model(tokens.to(setup.device)).logits, expected, "logits")
        model.generate(tokens.to(setup.device), **greedy(16))
    return result


def check_lora(setup: Setup) -> dict:
    """Steps with adapters in bfloat16: the loss begins where the CPU's is, and falls."""
    if not find_spec("peft"):
        raise NotRun("peft is not installed")
    from peft import LoraConfig, get_peft_model

    reference, tokens = make_family("v3", setup), make_tokens(setup)
    targets = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    model = get_peft_model(put(reference, setup, torch.bfloat16), LoraConfig(r=8, target_modules=targets)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    on_device, losses = tokens.to(setup.device), []
    for _ in range(4):
        output = model(input_ids=on_device, labels=on_device)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.lm_loss.item())
    with torch.no_grad():
        expected = reference(tokens, labels=tokens).loss.item()
    error = abs(losses[0] / expected - 1)
    require(error <= TOLERANCE[torch.bfloat16], f"the first loss is {losses[0]}, on the CPU {expected}")
    require(losses[-1] < losses[0], f"the loss does not fall: {losses}")
    return {"loss error": number(error), "first loss": number(losses[0]), "last loss": number(losses[-1])}


def check_nsa_kernels(setup: Setup) -> dict:
    """Triton's branches against PyTorch's, outputs and gradients, on the same device."""
    from deepseek_repo import nsa_deepseek as nsa, nsa_kernels_deepseek as kernels

    need_triton(setup)
    length, heads, width = (1024, 16, 64) if setup.full else (24, 3, 8)
    sizes = nsa.NSASizes() if setup.full else nsa.NSASizes(8, 4, 16, 2, 1, 1, 12)
    entries, result = sizes.num_compressed(length), {}
    torch.manual_seed(0)
    shapes = [(2, length, heads, width), *[(2, n, width) for n in (entries, entries, length, length, length, length)]]
    exact = [torch.randn(shape, device=setup.device) for shape in shapes]
    for dtype in (torch.float32, torch.bfloat16) if setup.device == "cuda" else (torch.float32,):
        runs = []
        leaves = [(2 * x if i == 0 else x).to(dtype) for i, x in enumerate(exact)]
        blocks = None  # both read the same, lest rounding chooses others
        for functions, own in ((nsa, torch.float32), (kernels, dtype)):
            own_leaves = [leaf.detach().to(own).requires_grad_() for leaf in leaves]
            query, ck, cv, sk, sv, wk, wv = own_leaves
            compressed, chosen = functions.compressed_attention(query, ck, cv, width**-0.5, 0, sizes)
            blocks = chosen if blocks is None else blocks
            selected = functions.selected_attention(query, sk, sv, blocks, width**-0.5, 0, sizes.select_block)
            window = functions.window_attention(query, wk, wv, width**-0.5, sizes.window)
            outputs = torch.stack((compressed, selected, window))
            runs.append((outputs, torch.autograd.grad(outputs.float().square().sum(), own_leaves), chosen))
        (expected, expected_gradients, expected_blocks), (outputs, gradients, chosen) = runs
        result |= compare(outputs, expected, f"outputs {short(dtype)}", dtype=dtype)
        pairs = zip(gradients, expected_gradients, strict=True)
        worst = max(relative(actual, reference) for actual, reference in pairs)
        require(worst <= GRADIENT_TOLERANCE[dtype], f"gradients in {dtype} differ by {worst}")
        result[f"gradients {short(dtype)}"] = number(worst)
        same = (chosen.sort().values == expected_blocks.sort().values).float().mean().item()
        result[f"same blocks {short(dtype)}"] = round(same, 4)
        require(same > (0.999 if dtype == torch.float32 else 0.9), f"blocks chosen alike in {dtype}: {same}")
    return result


def check_dsa_kernels(setup: Setup) -> dict:
    """The indexer's scores and absorbed attention to chosen latents, against PyTorch's, on the same device."""
    from deepseek_repo import dsa_deepseek as dsa, dsa_kernels_deepseek as kernels

    need_triton(setup)
    queries, keys, chosen, result = (64, 2048, 256, {}) if setup.full else (3, 40, 21, {})
    heads, nope, rope, latent, value = (16, 128, 64, 512, 128) if setup.full else (2, 6, 8, 24, 5)
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device=setup.device)

    query, weights, key = random(2, queries, heads, nope), random(2, queries, heads), random(2, keys, nope)
    states = random(2, heads, queries, nope), random(2, heads, queries, rope), random(2, keys, latent)
    k_rope, ups = random(2, keys, rope), (0.1 * random(heads, nope, latent), 0.1 * random(heads, value, latent))
    picks = torch.stack([torch.randperm(keys)[:chosen] for _ in range(2 * queries)]).view(2, queries, chosen)
    picks[1, 0, ::4] = -1
    picks = picks.to(setup.device)
    for dtype in (torch.float32, torch.bfloat16) if setup.device == "cuda" else (torch.float32,):
        rounded = [x.to(dtype) for x in (query, key, *states, k_rope, *ups)]
        q, k, q_nope, q_rope, c, r, w_uk, w_uv = rounded
        result |= compare(
            kernels.index_scores(q, weights, k), dsa.index_scores(q, weights, k), f"scores {short(dtype)}", dtype=dtype
        )
        actual = kernels.attend_chosen_latents(q_nope * 0.1, q_rope * 0.1, c, r, (w_uk, w_uv), picks)
        gathered = (dsa.gather_tokens(x, picks).float() for x in (c, r))
        scaled = ((x * 0.1).float() for x in (q_nope, q_rope))
        expected, _ = dsa.attend_latents(*scaled, *gathered, (w_uk.float(), w_uv.float()), picks >= 0)
        result |= compare(actual, expected, f"outputs {short(dtype)}", dtype=dtype)
    return result


def check_fp8(setup: Setup) -> dict:
    """A block-scaled FP8 checkpoint kept in FP8 on the GPU, against itself dequantised."""
    from deepseek_repo.loading_deepseek import hardware_has_fp8
    from deepseek_repo.modeling_deepseek import DeepseekForCausalLM

    if not hardware_has_fp8(setup.device):
        raise NotRun("no GPU with FP8 arithmetic (8.9 and later), or no `kernels` package")
    tokens = make_tokens(setup)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_fp8(Path(folder), setup)
        expected = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits
        kept = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=setup.device).eval()
        weights = [p for p in kept.state_dict().values() if p.dtype == torch.float8_e4m3fn]
        require(bool(weights), "nothing is kept in FP8")
        # activations are rounded to FP8 as well, to three bits; of weights that costs 0.2
        return compare(kept(tokens.to(setup.device)).logits, expected, "logits", tolerance=0.4) | {
            "tensors in FP8": len(weights)
        }


def save_fp8(folder: Path, setup: Setup):
    """A V3 checkpoint whose matrices are FP8 with a scale for each block of 128 x 128, as the published ones have them -> the
    model that was rounded so."""
    from safetensors.torch import load_file, save_file

    sides = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256, "kv_lora_rank": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    model = make_family("v3", setup, **sides, **heads, q_lora_rank=128, v_head_dim=128)
    model.save_pretrained(folder)
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = tensor
        if tensor.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "norm", "mlp.gate.", "eh_proj")):
            rows, columns = (-(-side // 128) for side in tensor.shape)
            padded = torch.zeros(128 * rows, 128 * columns)
            padded[: tensor.shape[0], : tensor.shape[1]] = tensor
            blocks = padded.view(rows, 128, columns, 128)
            scales = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            quantised = (blocks / scales[:, None, :, None]).view_as(padded).to(torch.float8_e4m3fn)
            stored[name] = quantised[: tensor.shape[0], : tensor.shape[1]].contiguous()
            stored[f"{name}_scale_inv"] = scales
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    scheme = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    return model


# ---------------------------------------------------------------------------------------------------------------
# What checks share
# ---------------------------------------------------------------------------------------------------------------


def need_triton(setup: Setup):
    """Raises NotRun where kernels cannot run: Triton is missing, or on a CPU not in its interpreter."""
    if not find_spec("triton"):
        raise NotRun("Triton is not installed")
    import triton

    if setup.device == "cpu" and not triton.knobs.runtime.interpret:
        raise NotRun("without a GPU, Triton's interpreter needs TRITON_INTERPRET=1")


def put(model, setup: Setup, dtype: torch.dtype, experts: str = "grouped_mm"):
    """A copy on the device."""
    model = copy.deepcopy(model).to(setup.device, dtype)
    model.set_experts_implementation(experts)
    return model


def greedy(count: int) -> dict:
    return {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


def decode(model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of all tokens, the last four run one by one over a cache."""
    first = model(tokens[:, :-4], use_cache=True)
    logits, cache = [first.logits], first.past_key_values
    for place in range(tokens.shape[1] - 4, tokens.shape[1]):
        logits.append(model(tokens[:, place, None], past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def compare(actual, expected, what: str, dtype: torch.dtype | None = None, tolerance: float | None = None) -> dict:
    """Errors of rows (the last dimension), held to the tolerance of the dtype -> those that count, by name."""
    dtype = dtype or actual.dtype
    require(bool(actual.isfinite().all()), f"{what}: numbers that are not finite")
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-9)
    error = (errors.max() if dtype == torch.float32 else errors.median()).item()
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    require(error <= tolerance, f"{what}: error {error:.3g}, allowed {tolerance:g}; largest {errors.max():.3g}")
    return {what if short(dtype) in what else f"{what} {short(dtype)}": number(error)}


def compare_gradients(reference, model, tokens: torch.Tensor) -> dict:
    """Gradients in float32, each parameter's as a whole; the worst."""
    gradients = []
    for one in (reference, model):
        device = next(one.parameters()).device
        one.zero_grad()
        one.train()(tokens.to(device), labels=tokens.to(device)).loss.backward()
        one.eval()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    expected, actual = gradients
    require(expected.keys() == actual.keys(), f"other parameters have gradients: {expected.keys() ^ actual.keys()}")
    name, worst = max(((name, relative(actual[name], expected[name])) for name in expected), key=lambda pair: pair[1])
    require(worst <= GRADIENT_TOLERANCE[torch.float32], f"the gradient of {name} differs by {worst:.3g}")
    return {"gradients float32": number(worst)}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-9)).item()


def share_of_equal(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return round((actual.cpu() == expected.cpu()).double().mean().item(), 3)


def require(holds: bool, message: str):
    if not holds:
        raise AssertionError(message)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def number(value: float) -> float:
    return float(f"{value:.3g}")
