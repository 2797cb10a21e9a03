"""vLLM on a CPU gives this repository's tokens and log-probabilities: `make test-vllm`, in an environment of its own.

Two ways lead into vLLM: its transformers backend runs this repository's code (`trust_remote_code=True`), its own classes
read this repository's files. Each has a path with MLA's latents in the cache and one with expanded keys and values.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import ROOT
from tiny import FAMILIES, make_tokens
from transformers import AutoModelForCausalLM

# vLLM's kernels take few widths: heads of 128, and for MLA the published latent of 512 with 64 rotated entries.
WIDTHS = {"hidden_size": 128, "vocab_size": 512, "intermediate_size": 160}
MOE_WIDTHS = {"moe_intermediate_size": 64}
MLA_WIDTHS = {"kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
NEW_TOKENS = 24
TOLERANCE = 1e-4  # of a log-probability, float32
# Its CPU kernel for rotary embeddings takes a query [tokens, heads, width] for one of a single head, see
# docs/interoperability.md. YaRN, and so every published model with MLA, has an embedding without this kernel.
WITHOUT_ITS_ROTARY_KERNEL = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
WORKER = Path(__file__).with_name("vllm_worker.py")


def _widths(family: str) -> dict:
    fields = FAMILIES[family]
    moe, mla = "n_routed_experts" in fields, "kv_lora_rank" in fields
    return WIDTHS | (MOE_WIDTHS if moe else {}) | (MLA_WIDTHS if mla else {})


def _decode(folder: Path, prompts: list[list[int]], mla: bool, **engine) -> list[dict]:
    request = {"engine": {"model": str(folder), **engine}, "prompts": prompts, "max_tokens": NEW_TOKENS}
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_MLA_DISABLE": "0" if mla else "1",
    }
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(request)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@torch.no_grad()
def _assert_as_transformers(folder: Path, prompts: list[list[int]], found: list[dict]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert len(found) == len(prompts)
    for prompt, answer in zip(prompts, found, strict=True):
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert answer["tokens"] == whole[0, len(prompt) :].tolist()
        expected = model(whole).logits[0, :-1].log_softmax(dim=-1)
        assert len(answer["logprobs"]) == len(expected)
        for row, place in zip(expected, answer["logprobs"], strict=True):
            assert len(place) >= 5
            for token, value in place.items():
                assert row[int(token)].item() == pytest.approx(value, abs=TOLERANCE)


def _random_checkpoint(checkpoint, family: str) -> tuple[Path, list[list[int]]]:
    folder = checkpoint(family, **_widths(family))
    prompts = [make_tokens(1, length, vocab_size=512, seed=length)[0].tolist() for length in (7, 23, 40)]
    return folder, prompts


@pytest.fixture(scope="module")
def prompts():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT)(["It was a dark night, and", "从前有一个", "def fib(n):\n"]).input_ids


@pytest.mark.timeout(900)
def test_this_checkpoint_in_the_transformers_backend(prompts):
    found = _decode(ROOT, prompts, mla=False, model_impl="transformers", trust_remote_code=True)
    _assert_as_transformers(ROOT, prompts, found)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_this_checkpoint_in_its_own_class(prompts, trust_remote_code):
    engine = {"model_impl": "vllm", "trust_remote_code": trust_remote_code, **WITHOUT_ITS_ROTARY_KERNEL}
    _assert_as_transformers(ROOT, prompts, _decode(ROOT, prompts, mla=False, **engine))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("model_impl", ["vllm", "transformers"])
def test_pruned_experts(prompts, tmp_path, model_impl):
    prune = pytest.importorskip("compress.prune", reason="made before requirements-vllm.txt had matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("It was a dark night, and 从前有一个国王。 def fib(n): return n\n" * 50)
    folder = tmp_path / "pruned"
    options = ["--keep", "0.5", "--calibration", str(text), "--tokens", "2000", "--unseen", "drop"]
    assert prune.main(["--model", str(ROOT), "--output", str(folder), *options]) == 0
    engine = {"model_impl": model_impl, "trust_remote_code": True, **WITHOUT_ITS_ROTARY_KERNEL}
    _assert_as_transformers(folder, prompts, _decode(folder, prompts, mla=False, **engine))


@pytest.mark.timeout(900)
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="vLLM's CPU kernel for rotary embeddings")
def test_its_rotary_kernel(prompts):
    """Fails as soon as vLLM is right without the setting; then the setting and its documentation go."""
    found = _decode(ROOT, prompts, mla=False, model_impl="vllm")
    assert all(len(answer["tokens"]) == NEW_TOKENS for answer in found)
    _assert_as_transformers(ROOT, prompts, found)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["llama", "deepseek", "v2_lite", "v2", "v3"])
def test_the_transformers_backend(checkpoint, family):
    folder, prompts = _random_checkpoint(checkpoint, family)
    found = _decode(folder, prompts, mla=False, model_impl="transformers", trust_remote_code=True)
    _assert_as_transformers(folder, prompts, found)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "mla", "trust_remote_code"),
    [
        ("llama", False, False),
        ("v2_lite", False, False),
        ("v2", False, False),
        ("v3", False, False),
        ("v2_lite", True, False),
        ("v2", True, False),
        ("v3", True, False),
        (
            "deepseek",
            False,
            True,
        ),  # transformers has no class of this model_type, so vLLM asks for its configuration here
        ("v3", False, True),
    ],
)
def test_its_own_classes(checkpoint, family, mla, trust_remote_code):
    folder, prompts = _random_checkpoint(checkpoint, family)
    found = _decode(folder, prompts, mla, model_impl="vllm", trust_remote_code=trust_remote_code)
    _assert_as_transformers(folder, prompts, found)
