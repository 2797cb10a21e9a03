"""`linear` and `project`: the product with few rows that takes all threads of a CPU, and where it stays away."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close
from deepseek_repo import linear_deepseek
from deepseek_repo.linear_deepseek import FEW_ROWS, linear, project
from tiny import FAMILIES, make_model, make_tokens
from torch import nn
from torch._dynamo.testing import CompileCounter

WIDTH, OUT = 24, 48


@pytest.fixture
def threads(monkeypatch):
    """Sets how many threads there seem to be, with each matrix large enough for them."""
    monkeypatch.setattr(linear_deepseek, "_PART_WEIGHTS", 8)
    monkeypatch.setattr(linear_deepseek, "_HAS_MKL", True)

    def set_threads(count: int):
        monkeypatch.setattr(linear_deepseek, "count_threads", lambda: count)

    set_threads(3)
    return set_threads


@pytest.fixture
def plain_products(monkeypatch):
    """The weights that `F.linear` is called with."""
    seen, plain = [], F.linear

    def spy(rows, weight, bias=None):
        seen.append(weight)
        return plain(rows, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5,), (2, 3), (1, FEW_ROWS)])
@pytest.mark.parametrize("out", [1, 7, 30, OUT])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 64])
def test_equals_the_plain_product(threads, plain_products, shape, out, count):
    threads(count)
    rows, weight = torch.randn(*shape, WIDTH), torch.randn(out, WIDTH)
    for bias in (None, torch.randn(out)):
        expected = rows.double() @ weight.double().T + (0 if bias is None else bias.double())
        actual = linear(rows, weight, bias)
        assert actual.dtype == torch.float32
        assert_close(actual.double(), expected, atol=1e-5)
    split = count > 1 and out > 1 and not (out == 7 and count in (2, 3, 5))  # a prime number has no parts
    assert bool(plain_products) != split or (out == 7 and count == 64)


@torch.no_grad()
def test_parts_never_number_more_than_the_rows_of_the_matrix(threads):
    for count in range(1, 130):
        threads(count)
        for out in range(1, 70):
            parts = linear_deepseek._count_parts(torch.zeros(1, WIDTH), torch.zeros(out, WIDTH))
            assert 1 <= parts <= out
            assert out % parts == 0


def special_cases():
    """Names, rows and weights with which `linear` must be `F.linear` to the bit, and the context of the call."""
    rows, weight = torch.randn(2, WIDTH), torch.randn(OUT, WIDTH)
    off = torch.no_grad
    yield "many rows", torch.randn(FEW_ROWS + 1, WIDTH), weight, off
    yield "no rows", torch.randn(0, WIDTH), weight, off
    yield "gradients", rows, weight, torch.enable_grad
    yield "bfloat16", rows.bfloat16(), weight.bfloat16(), off
    yield "float64", rows.double(), weight.double(), off
    yield "transposed in memory", rows, torch.randn(WIDTH, OUT).T, off
    yield "a kind of weight of its own", rows, weight.as_subclass(type("Packed", (torch.Tensor,), {})), off
    yield "a kind of input of its own", rows.as_subclass(type("Traced", (torch.Tensor,), {})), weight, off


@pytest.mark.parametrize("case", list(special_cases()), ids=lambda case: case[0])
def test_special_cases_take_the_plain_product(threads, plain_products, case):
    _, rows, weight, context = case
    with context():
        assert torch.equal(linear(rows, weight), F.linear(rows, weight))
    assert len(plain_products) == 2


@torch.no_grad()
def test_autocast_and_tracing_take_the_plain_product(threads, plain_products):
    rows, weight = torch.randn(2, WIDTH), torch.randn(OUT, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(rows, weight).dtype == torch.bfloat16
    traced = torch.jit.trace(lambda rows: linear(rows, weight), rows, check_trace=False)
    more = torch.randn(9, WIDTH)
    assert_close(traced(more), more @ weight.T, atol=1e-5)
    assert len(plain_products) == 2


@torch.no_grad()
def test_wrong_widths_and_dtypes_raise_as_in_pytorch(threads):
    weight = torch.randn(OUT, WIDTH)
    for rows in (torch.randn(2, WIDTH + 1), torch.randn(2, WIDTH).bfloat16()):
        with pytest.raises(RuntimeError):
            linear(rows, weight)


def observe(how: str, module: nn.Linear, calls: list):
    """Lets something see each call of a Linear; returns the module to call, and what ends it."""
    if how == "forward hook":
        return module, module.register_forward_hook(lambda *_: calls.append(how)).remove
    if how == "forward pre-hook":
        return module, module.register_forward_pre_hook(lambda *_: calls.append(how)).remove
    if how == "global forward hook":
        return module, nn.modules.module.register_module_forward_hook(lambda *_: calls.append(how)).remove
    if how == "global forward pre-hook":
        return module, nn.modules.module.register_module_forward_pre_hook(lambda *_: calls.append(how)).remove
    if how == "forward of its own":
        given = module.forward
        module.forward = lambda rows: (calls.append(how), given(rows))[1]  # as accelerate and llm-compressor do
        return module, lambda: None

    class Subclass(nn.Linear):
        def forward(self, rows):
            calls.append(how)
            return super().forward(rows)

    module.__class__ = Subclass  # as parametrisations do
    return module, lambda: None


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [
        "forward hook",
        "forward pre-hook",
        "global forward hook",
        "global forward pre-hook",
        "forward of its own",
        "subclass",
    ],
)
def test_a_module_that_is_observed_is_called(threads, how):
    calls = []
    module, end = observe(how, nn.Linear(WIDTH, OUT), calls)
    rows = torch.randn(1, WIDTH)
    try:
        output = project(module, rows)
    finally:
        end()
    assert calls == [how]
    assert_close(output, rows @ module.weight.T + module.bias, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cached_weights", [0, 2**21])
def test_a_graph_for_one_row_for_few_and_for_many(threads, monkeypatch, cached_weights):
    """And not one for each number of rows."""
    monkeypatch.setattr(linear_deepseek, "_CACHED_WEIGHTS", cached_weights)
    module, counter = nn.Linear(WIDTH, OUT), CompileCounter()
    compiled = torch.compile(lambda rows: project(module, rows), backend=counter, fullgraph=True, dynamic=True)
    for count in (1, 1, 2, 3, 8, 9, 20, FEW_ROWS, FEW_ROWS + 5, FEW_ROWS + 9, 5, 11):
        rows = torch.randn(count, WIDTH)
        assert_close(compiled(rows), F.linear(rows, module.weight, module.bias), atol=1e-5)
    assert counter.frame_count <= 4


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 3, 12])
def test_compiled_by_inductor(threads, dtype, count):
    rows, weight = torch.randn(count, WIDTH).to(dtype), torch.randn(OUT, WIDTH).to(dtype)
    actual = torch.compile(linear, fullgraph=True)(rows, weight)
    assert actual.dtype == dtype
    expected = rows.double() @ weight.double().T
    rounding = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps  # of the result, and of its sum
    assert_close(actual.double(), expected, atol=rounding * expected.abs().max().item())


@torch.no_grad()
def test_exported_for_any_number_of_rows(threads):
    class Projection(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(WIDTH, OUT)

        def forward(self, rows):
            return project(self.inner, rows)

    module = Projection()
    exported = torch.export.export(module, (torch.randn(4, WIDTH),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    for count in (2, 3, FEW_ROWS + 5):
        rows = torch.randn(count, WIDTH)
        assert_close(exported.module()(rows), F.linear(rows, module.inner.weight, module.inner.bias), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_same_with_any_number_of_threads(threads, plain_products, family):
    """Greedy tokens and logits of two rows, a prompt and decoding over a cache."""
    model, tokens = make_model(family), make_tokens(2, 40)
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    outputs = {}
    for count in (1, 2, 3):
        threads(count)
        plain_products.clear()
        generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        outputs[count] = torch.stack(generated.logits), len(plain_products)
        assert_close(outputs[count][0], outputs[1][0], atol=1e-5)
    assert outputs[2][1] < outputs[1][1] / 2  # most products were split


# Products that are never large, or are none of a module's in a decoding step
ELSEWHERE = ("kv_b_proj", "weights_proj", "branch_gate", "compress_key.", "compress_value.")


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_all_large_products_of_a_step_go_through_it(monkeypatch, family):
    model, seen = make_model(family), set()
    options = {"do_sample": False, "mtp_tokens": model.config.num_nextn_predict_layers}

    def spy(rows, weight, bias=None):
        seen.add(weight.data_ptr())
        return F.linear(rows, weight, bias)

    monkeypatch.setattr(linear_deepseek, "linear", spy)
    model.generate(make_tokens(1, 40), max_new_tokens=8, **options)
    layers = {name: module.weight for name, module in model.named_modules() if type(module) is nn.Linear}
    missed = {name for name, weight in layers.items() if weight.data_ptr() not in seen}
    assert not [name for name in missed if not any(part in name for part in ELSEWHERE)]
