"""The two stages of DeepSeek Sparse Attention's training, and native sparse attention, by the training script."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, make_tokens
from tiny_corpus import VOCAB_SIZE, write_workspace

from pretrain import evaluate, train
from pretrain.data import HeldOut, load_held_out
from tools import add_indexer


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("pretrain"))


def _train(workspace, model_dir, run, *more) -> list[dict]:
    options = {
        "--model": model_dir,
        "--data": workspace / "data",
        "--tokenizer": workspace / "tokenizer",
        "--run-dir": run,
        "--batch-rows": 4,
        "--row-tokens": 32,
        "--precision": "fp32",
        "--warmup-steps": 2,
        "--log-every": 5,
        "--checkpoint-every": 100,
    }
    assert train.main([*(str(part) for pair in options.items() for part in pair), *map(str, more)]) == 0
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_recall_is_what_slow_loops_count():
    from deepseek_repo.dsa_deepseek import dsa_reference

    topk, tokens = 5, make_tokens(1, 24)
    tokens[0, 9] = 0  # a second document
    model = make_model("v32", index_topk=topk)
    dense = make_model("v32", index_topk=100, attention="eager")  # the same weights
    index_states = []

    def keep(attention, arguments, kwargs):
        latent = attention.query_latent(*arguments)
        index_states.append(attention.indexer(*arguments, latent, kwargs["position_embeddings"]))

    for layer in dense.model.layers[:3]:
        layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True)
    positions = torch.tensor([[*range(9), *range(15)]])
    attentions = dense(tokens, position_ids=positions, use_cache=False, output_attentions=True).attentions
    visible = torch.ones(24, 24).tril().bool()
    visible[9:, :9] = False

    found = evaluate.index_recall(model, {"en": HeldOut(tokens, 23, 100)}, 0, 1, torch.device("cpu"))
    assert model.config.index_topk == topk
    assert model.config._attn_implementation == "sdpa"
    for layer, states in enumerate(index_states):
        chosen = dsa_reference(states.query[0], states.weights[0], states.key[0], visible, topk)
        hits = queries = 0
        for t in range(24):
            if visible[t].sum() > topk:
                queries += 1
                true = attentions[layer][0, :, t].sum(dim=0).masked_fill(~visible[t], -1).topk(topk).indices.tolist()
                hits += len(chosen[t] & set(true))
        assert queries == 4 + 10
        assert found[str(layer)] == pytest.approx(hits / (queries * topk))


@pytest.mark.slow
def test_warmup_teaches_the_indexer_alone_and_sparse_training_the_rest(workspace, checkpoint, tmp_path):
    sizes = ["--index-topk", "4", "--index-n-heads", "4", "--index-head-dim", "16"]
    with_indexer, warm = tmp_path / "with-indexer", tmp_path / "warm"
    assert add_indexer.main([str(checkpoint("v3", vocab_size=VOCAB_SIZE)), str(with_indexer), *sizes]) == 0

    held_out = load_held_out(workspace / "data", 32)
    untrained = train.build_model(with_indexer, VOCAB_SIZE, "weights")
    recall = evaluate.index_recall(untrained, held_out, 0, train.RECALL_WINDOWS, torch.device("cpu"))

    options = ["--start", "weights", "--learning-rate", 1e-2, "--steps", 40, "--eval-every", 100]
    log = _train(workspace, with_indexer, tmp_path / "a", *options, "--dsa-stage", "warmup", "--export-dir", warm)
    losses = [record["index_loss"] for record in log if "index_loss" in record]
    assert losses[-1] < 0.8 * losses[0]
    before, after = load_file(with_indexer / "model.safetensors"), load_file(warm / "model.safetensors")
    for name in before:
        changed = not torch.equal(before[name].bfloat16(), after[name].bfloat16())
        assert changed == (".indexer." in name and "k_norm.bias" not in name) or "k_norm" in name, name

    options = ["--start", "weights", "--learning-rate", 3e-3, "--steps", 20, "--eval-every", 100]
    log_sparse = _train(
        workspace, warm, tmp_path / "b", *options, "--dsa-stage", "sparse", "--export-dir", tmp_path / "end"
    )
    losses = [record["lm_loss"] for record in log_sparse if "lm_loss" in record]
    assert losses[-1] < losses[0]
    end = load_file(tmp_path / "end" / "model.safetensors")
    assert not [name for name in end if end[name].ndim > 1 and torch.equal(end[name], after[name])]

    for trained in (log[-1]["index_recall"], log_sparse[-1]["index_recall"]):
        assert trained.keys() == recall.keys() == {"0", "1", "2"}
        assert sum(trained.values()) > sum(recall.values()) + 0.3
    page = (tmp_path / "b" / "report.html").read_text()
    assert "Indexer: loss" in page
    assert "true top-k" in page


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("v3", {}, "needs a model with an indexer (index_topk is null); make one out of a V3 checkpoint"),
        ("v32", {"index_topk": 32}, "--row-tokens is 32, but index_topk is 32: every token would be selected"),
        ("v32", {"index_loss_weight": 0}, "index_loss_weight is 0; set it"),
    ],
)
def test_stages_refuse_models_that_cannot_have_them(family, overrides, message):
    with pytest.raises(ValueError) as error:
        train.set_dsa_stage(make_model(family, **overrides), "warmup", row_tokens=32)
    assert message in str(error.value)


@pytest.mark.slow
def test_native_sparse_attention_trains(workspace, checkpoint, tmp_path):
    model_dir = checkpoint("nsa", vocab_size=VOCAB_SIZE)
    log = _train(workspace, model_dir, tmp_path / "run", "--steps", 15, "--learning-rate", 5e-3, "--eval-every", 100)
    losses = [record["lm_loss"] for record in log if "lm_loss" in record]
    assert losses[-1] < losses[0]
    assert log[-1]["bits_per_byte"].keys() == {"en", "zh"}
