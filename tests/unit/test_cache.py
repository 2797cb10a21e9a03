"""Our cache layers do what transformers' do, whatever the order of operations, but copy less."""

import copy

import pytest
import torch
from deepseek_repo.cache_deepseek import GrowingLayer, LatentLayer, StaticLatentLayer, use_growing_layers
from hypothesis import given, settings, strategies as st
from tiny import make_model, make_tokens
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

operations = st.one_of(
    st.tuples(st.just("append"), st.sampled_from([1, 1, 1, 2, 5, 40, 300])),
    st.tuples(st.just("append with gradients"), st.integers(1, 3)),
    st.tuples(st.just("crop"), st.integers(1, 8)),
    st.tuples(st.just("reorder"), st.integers(0, 99)),
    st.tuples(st.just("select"), st.integers(0, 99)),
    st.tuples(st.just("repeat"), st.just(2)),
    st.tuples(st.just("reset"), st.just(0)),
    st.tuples(st.just("deepcopy"), st.just(0)),
)


@settings(max_examples=250, deadline=None)
@given(st.sampled_from([GrowingLayer, LatentLayer]), st.lists(operations, min_size=1, max_size=15))
def test_equals_dynamic_layer(make_layer, sequence):
    ours, reference = make_layer(), DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    batch = 2
    for operation, amount in sequence:
        length = reference.get_seq_length()
        rows = torch.randint(0, batch, (batch,), generator=torch.Generator().manual_seed(amount))
        if operation.startswith("append"):
            keys = torch.randn(batch, 1, amount, 5, generator=generator)
            values = torch.randn(batch, 1, amount, 3, generator=generator)
            with torch.set_grad_enabled("gradients" in operation):
                keys.requires_grad_("gradients" in operation)
                returned, expected = ours.update(keys, values), reference.update(keys, values)
            assert all(torch.equal(mine, other) for mine, other in zip(returned, expected, strict=True))
        elif operation == "crop" and length > amount:
            for layer in (ours, reference):
                layer.crop(-amount)
        elif operation == "reorder" and length:
            for layer in (ours, reference):
                layer.reorder_cache(rows)
        elif operation == "select" and length:
            for layer in (ours, reference):
                layer.batch_select_indices(rows[:1])
            batch = 1
        elif operation == "repeat" and length and batch < 5:
            for layer in (ours, reference):
                layer.batch_repeat_interleave(amount)
            batch *= amount
        elif operation == "reset" and length:
            # In some versions a reset DynamicLayer keeps zeros; a fresh one is what all mean.
            ours.reset()
            reference = DynamicLayer()
            if ours.get_seq_length():
                ours = make_layer()
            batch = 2
        elif operation == "deepcopy" and length and not ours.keys.requires_grad:
            ours, other = copy.deepcopy(ours), ours
            other.update(torch.zeros(batch, 1, 1, 5), torch.zeros(batch, 1, 1, 3))  # must not reach the copy
        assert ours.get_seq_length() == reference.get_seq_length()
        assert ours.get_mask_sizes(3) == reference.get_mask_sizes(3)
        if reference.get_seq_length():
            assert torch.equal(ours.keys, reference.keys)
            assert torch.equal(ours.values, reference.values)


@pytest.mark.parametrize("make_layer", [GrowingLayer, LatentLayer])
def test_appending_copies_little(make_layer):
    layer, addresses = make_layer(), set()
    for _ in range(1000):
        keys, _ = layer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
        addresses.add(keys.data_ptr())
    assert layer.get_seq_length() == 1000
    assert len(addresses) <= 6, "the past moved too often"
    width = 4 if make_layer is GrowingLayer else 8  # keys and values in one buffer
    assert layer.keys.untyped_storage().nbytes() <= 4 * width * (1000 * 1.5 + 256), "too much spare room"


def test_gradients_flow_through_the_past():
    """Writing into a buffer would change tensors that the graph needs."""
    layer, inputs = GrowingLayer(), [torch.randn(1, 1, 1, 4, requires_grad=True) for _ in range(3)]
    total = 0
    for keys in inputs:
        seen, _ = layer.update(keys, keys)
        total = total + (seen**2).sum()
    total.backward()
    for times, keys in zip((3, 2, 1), inputs, strict=True):
        assert torch.allclose(keys.grad, 2 * times * keys)


@pytest.mark.parametrize(("family", "kind"), [("deepseek", GrowingLayer), ("v3", LatentLayer)])
def test_model_puts_growing_layers_into_a_plain_cache(family, kind):
    model = make_model(family)
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        model(make_tokens(1, 4), past_key_values=cache)
        assert [type(layer) for layer in cache.layers] == [kind] * len(cache.layers)


def test_latents_lie_side_by_side():
    """Whatever was done to the two halves, `entries` is both of them or nothing."""
    layer = LatentLayer()
    assert layer.entries is None
    for change in (
        lambda: None,
        lambda: layer.crop(-1),
        lambda: layer.reorder_cache(torch.tensor([1, 0])),
        lambda: layer.batch_select_indices(torch.tensor([0])),
    ):
        rows = len(layer.keys) if layer.is_initialized else 2
        keys, values = layer.update(torch.randn(rows, 1, 3, 5), torch.randn(rows, 1, 3, 2))
        assert torch.equal(layer.entries, torch.cat((keys, values), dim=-1))
        change()
        assert layer.entries is None or torch.equal(layer.entries, torch.cat((layer.keys, layer.values), dim=-1))


def test_static_latents_equal_a_static_layer():
    layer, reference = StaticLatentLayer(16), StaticLayer(16)
    for count in (5, 1, 1, 4):
        states = torch.randn(2, 1, count, 6), torch.randn(2, 1, count, 3)
        for mine, other in zip(layer.update(*states), reference.update(*states), strict=True):
            assert torch.equal(mine, other)
    assert layer.get_seq_length() == reference.get_seq_length() == 11
    for one in (layer, reference):
        one.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.entries, torch.cat((reference.keys, reference.values), dim=-1))
    layer.reset()
    assert not layer.entries.any()
    assert layer.get_seq_length() == 0


def test_other_caches_are_left_alone():
    model = make_model("v3")
    static = StaticCache(config=model.config, max_cache_len=8)
    before = [type(layer) for layer in static.layers]
    use_growing_layers(static, lambda index: GrowingLayer(), len(before))
    assert [type(layer) for layer in static.layers] == before
    filled = DynamicCache()
    filled.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    use_growing_layers(filled, lambda index: GrowingLayer(), 1)
    assert type(filled.layers[0]) is DynamicLayer
    use_growing_layers(None, lambda index: GrowingLayer(), 1)


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_rows_of_a_cache(repeats):
    model, prompt = make_model("v3"), make_tokens(2, 9)
    cache = model(prompt).past_key_values
    cache.batch_repeat_interleave(repeats)
    new = make_tokens(2 * repeats, 1, seed=1)
    whole = torch.cat((prompt.repeat_interleave(repeats, dim=0), new), dim=1)
    expected = model(whole, use_cache=False).logits[:, -1:]
    assert torch.allclose(model(new, past_key_values=cache).logits, expected, atol=1e-4)
