"""Training: every loss against a slow computation, gradients everywhere, checkpointing, packed rows, padding."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_gradients_close, gradients
from deepseek_repo.losses_deepseek import places_with_further
from deepseek_repo.moe_deepseek import sequence_balance_loss
from slow_reference import SlowModel, slow_balance_loss, slow_cross_entropy
from tiny import FAMILIES, MAIN_FAMILIES, MOE_FAMILIES, MTP_FAMILIES, make_model, make_tokens


@pytest.fixture(params=MAIN_FAMILIES)
def family(request):
    return request.param


# Gradients


@pytest.mark.compatibility("full training")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_reaches_every_parameter(name, attention):
    model, tokens = make_model(name, attention=attention).train(), make_tokens(4, 40)
    model(tokens, labels=tokens).loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        per_matrix = parameter.grad.flatten(-2) if parameter.ndim == 3 else parameter.grad.flatten()[None]
        assert (per_matrix.abs().amax(dim=-1) > 0).all(), key  # of stacked experts: each one


def test_loss_is_the_next_token_loss(family):
    model, tokens = make_model(family), make_tokens(2, 9)
    labels = tokens.clone()
    labels[0, :4] = -100
    slow = SlowModel(model)
    total = sum(
        slow_cross_entropy(
            [row for t, row in enumerate(slow.logits(ids)[:-1]) if wanted[t + 1] != -100],
            [target for target in wanted[1:].tolist() if target != -100],
        )
        for ids, wanted in zip(tokens, labels, strict=True)
    )
    outputs = model(tokens, labels=labels)
    assert_close(outputs.loss, total / (labels[:, 1:] != -100).sum())
    assert_close(outputs.loss, outputs.lm_loss)


def test_losses_add_up(family):
    model, tokens = make_model(family).train(), make_tokens(2, 20)
    outputs, config = model(tokens, labels=tokens), model.config
    expected = outputs.lm_loss
    if getattr(config, "n_routed_experts", None):
        expected = expected + config.aux_loss_alpha * outputs.aux_loss
    if config.num_nextn_predict_layers:
        expected = expected + config.mtp_loss_weight * outputs.mtp_loss
    assert_close(outputs.loss, expected, atol=1e-6)
    assert (outputs.aux_loss is None) == ("n_routed_experts" not in FAMILIES[family])
    assert (outputs.mtp_loss is None) == (not config.num_nextn_predict_layers)


def test_evaluation_loss_has_no_extras(family):
    model, tokens = make_model(family), make_tokens(2, 20)
    evaluated, trained = model(tokens, labels=tokens), model.train()(tokens, labels=tokens)
    assert evaluated.aux_loss is evaluated.mtp_loss is None
    assert_close(evaluated.loss, trained.lm_loss, atol=1e-6)


@pytest.mark.compatibility("gradient accumulation")
def test_accumulated_steps_equal_one_batch(family):
    """`num_items_in_batch`, as the Trainer passes it: the losses of unequal parts add up to that of the whole."""
    model, tokens = make_model(family, aux_loss_alpha=0.0, mtp_loss_weight=0.0), make_tokens(4, 12)
    labels = tokens.clone()
    labels[0, :9] = -100
    model.train()
    model(tokens, labels=labels).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    count = (labels[:, 1:] != -100).sum()
    for part in range(4):
        rows = slice(part, part + 1)
        model(tokens[rows], labels=labels[rows], num_items_in_batch=count).loss.backward()
    assert_gradients_close(gradients(model), expected)


@pytest.mark.compatibility("gradient checkpointing")
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", [*MAIN_FAMILIES, "v3_mtp2"])
def test_gradient_checkpointing(name, use_reentrant):
    tokens, results = make_tokens(2, 20), []
    for checkpointing in (False, True):
        model = make_model(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            assert model.is_gradient_checkpointing
        outputs = model(tokens, labels=tokens)
        outputs.loss.backward()
        results.append((outputs, gradients(model)))
    (plain, plain_gradients), (checkpointed, checkpointed_gradients) = results
    for loss in ("loss", "lm_loss", "mtp_loss", "aux_loss"):
        expected, actual = getattr(plain, loss), getattr(checkpointed, loss)
        assert (expected is None) == (actual is None)
        if expected is not None:
            assert_close(actual, expected, loss, atol=1e-6)
    assert_gradients_close(checkpointed_gradients, plain_gradients, relative=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("family", MOE_FAMILIES, indirect=True)
def test_checkpointing_counts_each_token_once(family, use_reentrant):
    model, tokens = make_model(family).train(), make_tokens(2, 20)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(tokens, labels=tokens).loss.backward()
    for layer, load in model.update_router_bias(0.0).items():
        ahead = max(
            0, layer + 1 - model.config.num_hidden_layers
        )  # what a prediction module reads is not there for all
        assert load.sum() == 2 * (20 - ahead) * model.config.num_experts_per_tok, f"layer {layer}"


# Multi-token prediction


@pytest.mark.compatibility("prediction loss")
@pytest.mark.parametrize("name", MTP_FAMILIES)
def test_mtp_loss(name):
    model, tokens = make_model(name).train(), make_tokens(2, 9)
    slow, losses = SlowModel(model), []
    per_row = [slow.mtp_logits(row) for row in tokens]
    for k in range(1, model.config.num_nextn_predict_layers + 1):
        rows = zip(per_row, tokens.tolist(), strict=True)
        total = sum(slow_cross_entropy(logits[k - 1][:-1], row[k + 1 :]) for logits, row in rows)
        losses.append(total / (2 * (9 - k - 1)))
    assert_close(model(tokens, labels=tokens).mtp_loss, sum(losses) / len(losses))


@pytest.mark.parametrize("name", MTP_FAMILIES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_mtp_ignores_padding(name, padding):
    model, tokens = make_model(name, aux_loss_alpha=0.0).train(), make_tokens(2, 16)
    mask = torch.ones_like(tokens)
    hidden = slice(0, 6) if padding == "left" else slice(10, 16)
    real = slice(6, 16) if padding == "left" else slice(0, 10)
    tokens[1, hidden], mask[1, hidden] = 2, 0
    labels = tokens.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    actual = model(tokens, labels=labels, attention_mask=mask, position_ids=positions).mtp_loss
    short = tokens[1:, real]
    modules = model.config.num_nextn_predict_layers
    losses = [[], []]
    for row, ids in enumerate((tokens[:1], short)):
        states, *_ = model.model.predict_further(model.model(ids).last_hidden_state, ids)
        for k in range(1, modules + 1):
            layer = model.model.layers[model.config.num_hidden_layers + k - 1]
            logits = model.lm_head(layer.shared_head.norm(states[k - 1]))[0, : -k - 1]
            losses[row].append(F.cross_entropy(logits, ids[0, k + 1 :], reduction="sum"))
    expected = sum(
        (losses[0][k - 1] + losses[1][k - 1]) / (16 - k - 1 + short.shape[1] - k - 1) for k in range(1, modules + 1)
    )
    assert_close(actual, expected / modules)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_no_loss_and_no_gradient(name, padding):
    """Of a row alone: next token, modules, balance, indexers."""
    model, tokens = make_model(name).train(), make_tokens(1, 24)
    expected = model(tokens, labels=tokens)
    expected.loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    none = torch.full((1, 30), 2)
    padded = torch.cat((none, tokens) if padding == "left" else (tokens, none), dim=1)
    mask = (padded != 2).long()
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, mask.argmax()] = -100  # the first token has none before it to predict it
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    actual = model(padded, attention_mask=mask, position_ids=positions, labels=labels)
    for loss in ("lm_loss", "mtp_loss", "aux_loss", "index_loss", "loss"):
        assert (getattr(actual, loss) is None) == (getattr(expected, loss) is None)
        if getattr(expected, loss) is not None:
            assert_close(getattr(actual, loss), getattr(expected, loss), loss, atol=1e-5)
    actual.loss.backward()
    assert_gradients_close(gradients(model), wanted)


@pytest.mark.parametrize("name", MTP_FAMILIES)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_rows_too_short_for_a_module_have_finite_losses(name, length):
    model, tokens = make_model(name).train(), make_tokens(2, length)
    outputs = model(tokens, labels=tokens)
    assert outputs.aux_loss.isfinite()
    assert outputs.mtp_loss.isfinite()


def test_places_that_a_module_can_read():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])  # three documents
    embeds = torch.zeros(2, 8, 1)
    first, last = torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)
    first[1, :1], last[1, 6:] = False, False
    for mask, second in ((None, "11011100"), (first, "01011100"), (last, "11011000")):
        by_hand = torch.tensor([[int(c) for c in row] for row in ("11011100", second)]).bool()
        assert torch.equal(places_with_further(1, embeds, positions, mask), by_hand)
    assert places_with_further(2, embeds, positions, None)[0].tolist() == [c == "1" for c in "10011000"]
    assert not places_with_further(9, embeds, positions, None).any()


@pytest.mark.parametrize("name", MTP_FAMILIES)
def test_mtp_can_be_left_out(name):
    """No weight for its loss, or no modules: the same model, the same loss of the next token."""
    tokens, outputs = make_tokens(2, 16), []
    for overrides in ({}, {"mtp_loss_weight": 0.0}):
        outputs.append(make_model(name, **overrides).train()(tokens, labels=tokens))
    assert outputs[1].mtp_loss is None
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].lm_loss, outputs[1].lm_loss)


@pytest.mark.parametrize("name", MTP_FAMILIES)
def test_mtp_from_embeddings(name):
    model, tokens = make_model(name).train(), make_tokens(2, 16)
    expected = model(tokens, labels=tokens)
    actual = model(inputs_embeds=model.get_input_embeddings()(tokens), labels=tokens)
    assert_close(actual.mtp_loss, expected.mtp_loss)
    assert_close(actual.aux_loss, expected.aux_loss)


@pytest.mark.parametrize("name", MTP_FAMILIES)
def test_mtp_leaves_recorded_outputs_alone(name):
    """The recorded states are those of the model, not of the prediction modules behind it."""
    model, tokens = make_model(name, attention="eager"), make_tokens(2, 9)
    record = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    expected, actual = model(tokens, **record), model.train()(tokens, labels=tokens, **record)
    assert actual.mtp_loss is not None
    for field in ("hidden_states", "attentions", "router_logits"):
        assert len(actual[field]) == len(expected[field]), field
        for ours, reference in zip(actual[field], expected[field], strict=True):
            assert_close(ours, reference, field)


# Packed rows


@pytest.mark.compatibility("packed documents")
@pytest.mark.parametrize("name", [*MAIN_FAMILIES, "v3_mtp2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("use_cache", [None, False], ids=["default cache", ""])
def test_packed_documents_equal_separate_ones(name, attention, use_cache):
    model, lengths = make_model(name, attention=attention, aux_loss_alpha=0.0).train(), (7, 3, 12)
    documents = [make_tokens(1, length, seed=length) for length in lengths]
    packed = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = packed.masked_fill(positions == 0, -100)
    outputs = model(packed, labels=labels, position_ids=positions, use_cache=use_cache)
    separate = [model(document, labels=document, use_cache=use_cache) for document in documents]
    assert_close(outputs.logits, torch.cat([one.logits for one in separate], dim=1), "logits")
    lm_loss = sum(one.lm_loss * (length - 1) for one, length in zip(separate, lengths, strict=True))
    assert_close(outputs.lm_loss, lm_loss / (sum(lengths) - 3), "lm_loss")
    if model.config.num_nextn_predict_layers == 1:
        mtp_loss = sum(one.mtp_loss * (length - 2) for one, length in zip(separate, lengths, strict=True))
        assert_close(outputs.mtp_loss, mtp_loss / (sum(lengths) - 6), "mtp_loss")
    elif model.config.num_nextn_predict_layers == 2:
        slow = SlowModel(model)
        logits = [slow.mtp_logits(document[0]) for document in documents]
        losses = []
        for k in (1, 2):
            pairs = [
                (one[k - 1][:-1], document[0, k + 1 :].tolist())
                for one, document in zip(logits, documents, strict=True)
                if document.shape[1] > k + 1
            ]
            losses.append(sum(slow_cross_entropy(*pair) for pair in pairs) / sum(len(pair[1]) for pair in pairs))
        assert_close(outputs.mtp_loss, sum(losses) / 2, "mtp_loss")


# Balance


@pytest.mark.compatibility("balance loss")
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", [*MOE_FAMILIES, "v3_mtp2"])
def test_aux_loss_of_a_model(name, padded):
    model, tokens, mask = make_model(name).train(), make_tokens(3, 14), torch.ones(3, 14, dtype=torch.long)
    if padded:
        mask[1, :5], mask[2, 9:] = 0, 0
    routed = []
    for layer in model.model.layers:
        if layer.is_sparse:
            layer.mlp.gate.register_forward_hook(lambda gate, _, output: routed.append((gate, output)))
    labels = tokens.masked_fill(mask == 0, -100)
    outputs = model(tokens, labels=labels, attention_mask=mask)
    assert len(routed) == 2 + model.config.num_nextn_predict_layers
    expected = 0.0
    for number, (_, (logits, _, indices)) in enumerate(routed):
        scores = logits.softmax(-1) if model.config.scoring_func == "softmax" else logits.sigmoid()
        ahead = max(0, number - 1)  # of what module 1, 2, ... reads
        counted = mask * F.pad(mask[:, ahead:], (0, ahead))
        expected += slow_balance_loss(scores.detach().view(3, 14, -1), indices.view(3, 14, -1), counted)
    assert_close(outputs.aux_loss, torch.tensor(expected), "aux loss")


def choices(indices: torch.Tensor) -> torch.Tensor:
    """[B, S, P] -> float [B, S, 8], 1 where an expert is chosen"""
    return F.one_hot(indices, 8).sum(dim=2).float()


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_balance_loss_of_random_routing(padded):
    scores, indices = torch.rand(4, 9, 8) + 0.01, torch.rand(4, 9, 8).argsort(dim=-1)[..., :3]
    chosen, mask = choices(indices), None
    if padded:
        mask = torch.rand(4, 9) > 0.4
        mask[2] = False  # a row of padding only
        chosen = chosen * mask[..., None]
    expected = slow_balance_loss(scores, indices, mask)
    assert_close(sequence_balance_loss(scores, chosen, mask), torch.tensor(expected))


def test_balance_loss_is_one_at_perfect_balance():
    """Eight tokens, eight experts, three a token, each chosen three times, equal scores."""
    indices = (torch.arange(8)[:, None] + torch.arange(3)) % 8
    loss = sequence_balance_loss(torch.full((2, 8, 8), 0.3), choices(indices.expand(2, 8, 3)))
    assert_close(loss, torch.tensor(1.0), atol=1e-6)


def test_balance_loss_is_highest_at_collapse():
    """All tokens at the same expert, with all of the score: E / P times perfect balance."""
    scores = torch.full((1, 8, 8), 1e-9)
    scores[..., 5] = 1.0
    loss = sequence_balance_loss(scores, choices(torch.full((1, 8, 1), 5)))
    assert_close(loss, torch.tensor(8.0), atol=1e-4)


@pytest.mark.parametrize("family", MOE_FAMILIES, indirect=True)
def test_aux_loss_trains_the_router_only_through_scores(family):
    model, tokens = make_model(family, num_nextn_predict_layers=0).train(), make_tokens(2, 20)
    model(tokens, labels=tokens).aux_loss.backward()
    gate = model.model.layers[1].mlp.gate
    assert gate.weight.grad.abs().max() > 0
    assert model.model.layers[2].mlp.experts.down_proj.grad is None  # nothing behind the last router


@pytest.mark.parametrize("family", MOE_FAMILIES, indirect=True)
def test_aux_loss_evens_the_load(family):
    """Trained on the balance loss alone, the loads come closer together."""
    model, tokens = make_model(family, aux_loss_alpha=1.0).train(), make_tokens(8, 40)
    routers = [layer.mlp.gate for layer in model.model.layers if layer.is_sparse]
    optimizer = torch.optim.Adam([router.weight for router in routers], lr=2e-2)
    spreads = []
    for _ in range(40):
        model(tokens, labels=tokens).aux_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loads = torch.stack(list(model.update_router_bias(0.0).values()))
        spreads.append((loads.amax(dim=-1) / loads.mean(dim=-1)).mean().item())
    assert spreads[-1] < 1 + 0.7 * (spreads[0] - 1), spreads
