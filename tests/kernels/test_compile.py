"""Each kernel, with the arguments of its real calls, goes through Triton's compiler for GPUs that are not there.

The interpreter checks what kernels compute, and takes programs that the compiler refuses: a variable that changes its
type in a loop, say. Run without TRITON_INTERPRET: `python -m pytest -m slow tests/kernels`.
"""

import pytest
import torch
from deepseek_repo import dsa_kernels_deepseek, nsa_kernels_deepseek as kernels
from deepseek_repo.nsa_deepseek import NSASizes, NSAStates

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # float32 products take the compiler minutes

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # of one program, by compute capability


@pytest.fixture
def compiled(capability, monkeypatch) -> set[str]:
    """Kernels are compiled for a GPU where they would be launched on one -> the names of those compiled."""
    names = set()

    def compile_instead(kernel, *arguments, grid, warmup):
        signature, constants = {}, {}
        for parameter, value in zip(kernel.params, arguments, strict=True):
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):  # so does a launch specialise
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        target = GPUTarget("cuda", capability, 32)
        binary = triton.compile(ASTSource(kernel, signature, constants), target=target)
        assert binary.metadata.shared <= SHARED_BYTES[capability], kernel.__name__
        names.add(kernel.__name__)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", compile_instead)
    return names


@pytest.mark.parametrize(
    ("capability", "dtype", "group", "width", "value_width"),
    [(90, torch.bfloat16, 16, 192, 128), (80, torch.float32, 2, 192, 128), (90, torch.float32, 3, 64, 64)],
    ids=["the paper's heads", "largest tiles", "small group"],
)
def test_nsa_kernels_compile(compiled, dtype, group, width, value_width):
    sizes, length, heads = NSASizes(), 200, 2
    queries = torch.zeros(2, length, group, width, dtype=dtype, requires_grad=True)
    pairs = [
        tuple(torch.zeros(2, n, d, dtype=dtype, requires_grad=True) for d in (width, value_width))
        for n in (sizes.num_compressed(length), length, length)
    ]
    from_compressed, blocks = kernels.compressed_attention(queries, *pairs[0], 0.1, 0, sizes)
    from_selected = kernels.selected_attention(queries, *pairs[1], blocks, 0.1, 0, sizes.select_block)
    from_window = kernels.window_attention(queries, *pairs[2], 0.1, sizes.window)
    (from_compressed + from_selected + from_window).sum().backward()
    assert compiled == {
        *("_band_forward", "_band_backward_query", "_band_backward_key", "_block_scores"),
        *("_selected_forward", "_selected_backward_query", "_selected_backward_key"),
    }

    with torch.no_grad():  # one query: other arguments are 1
        query = torch.zeros(1, heads * group, 1, width, dtype=dtype)
        states = NSAStates(*(tuple(x[None, :heads] for x in pair) for pair in pairs))
        kernels.attend_gathered(query, query, states, None, torch.zeros(1, heads * group, 1, 3), 0.1, sizes)


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize(
    ("capability", "dtype"), [(90, torch.bfloat16), (80, torch.float32)], ids=["bfloat16", "float32"]
)
def test_dsa_kernels_compile(compiled, dtype, queries):
    """With V3.2's widths: 64 index heads of 128; latents of 512, 64 rotated."""
    heads, keys = 32, 300
    dsa_kernels_deepseek.index_scores(
        torch.zeros(1, queries, 64, 128, dtype=dtype),
        torch.zeros(1, queries, 64),
        torch.zeros(1, keys, 128, dtype=dtype),
    )
    q_nope, q_rope = (torch.zeros(1, heads, queries, width, dtype=dtype) for width in (128, 64))
    latent, k_rope = (torch.zeros(1, keys, width, dtype=dtype) for width in (512, 64))
    ups = torch.zeros(heads, 128, 512, dtype=dtype), torch.zeros(heads, 128, 512, dtype=dtype)
    chosen = torch.zeros(1, queries, 256, dtype=torch.int64)
    dsa_kernels_deepseek.attend_chosen_latents(q_nope, q_rope, latent, k_rope, ups, chosen)
    assert compiled == {"_index_scores", "_selected_latents"}
