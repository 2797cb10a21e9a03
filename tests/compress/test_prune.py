"""compress.prune: scores against slow loops, the pruned model against one whose router is masked, bytes, errors, resumption."""

import errno
import json
import re
import shutil

import pytest
import tiny
import tiny_chat
import torch
from checks import assert_close
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

from compress import prune, rewrite
from compress.calibration import Calibration, check_tokenizer, read_calibration
from compress.layers import LayerByLayer
from compress.scores import FIELDS, SCORES, choose, score

# Every family with experts and every form of groups; V3.2's rows are longer than what its indexer selects.
GROUPLESS = {"n_group": 1, "topk_group": 1}
ONE_GROUP_EACH = {"n_group": 2, "topk_group": 1}
CASES = [
    ("deepseek", {}),
    ("deepseek", {"norm_topk_prob": True}),
    ("v2_lite", {}),
    ("v2", {}),
    ("v2", ONE_GROUP_EACH),
    ("v3", {}),
    ("v3", GROUPLESS),
    ("v3", ONE_GROUP_EACH),
    ("v3", {"norm_topk_prob": False, "n_shared_experts": None}),
    ("v3_mtp2", {}),
    ("v3_mtp0", {}),
    ("v32", {}),
    ("nsa", {}),
]
IDS = [f"{family}-{'-'.join(map(str, overrides.values()))}".rstrip("-") for family, overrides in CASES]
BLOCK = 128


@pytest.fixture(params=CASES, ids=IDS)
def case(request):
    family, overrides = request.param
    # V3 chooses groups by their two best experts, so a group of two cannot lose one
    return family, {"n_routed_experts": 16, **overrides}


def tokens_in_rows(lengths=(40, 23, 7), sources=(0, 1, 1)) -> Calibration:
    ids = tiny.make_tokens(1, sum(lengths))[0]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    source = torch.cat([torch.full((length,), s) for length, s in zip(lengths, sources, strict=True)])
    return Calibration(ids, rows, source, ["a", "b"], ["not Chinese", "Chinese"])


@torch.no_grad()
def slow_sums(folder, calibration: Calibration) -> dict[int, torch.Tensor]:
    """Row by row through the whole model, then token by token and expert by expert."""
    model = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    num_layers, num_experts = model.config.num_hidden_layers, model.config.n_routed_experts
    sums = {
        index: torch.zeros(2, num_experts, len(FIELDS), dtype=torch.float64)
        for index, layer in enumerate(model.model.layers)
        if layer.is_sparse
    }
    seen = {}
    hooks = []
    for index in sums:
        layer = model.model.layers[index]
        hooks.append(
            layer.post_attention_layernorm.register_forward_hook(
                lambda m, x, y, i=index: seen.update({(i, "h"): x[0]})
            )
        )
        hooks.append(layer.mlp.register_forward_hook(lambda m, x, y, i=index: seen.update({(i, "mlp"): (x[0], y[0])})))
        hooks.append(layer.mlp.gate.register_forward_hook(lambda m, x, y, i=index: seen.update({(i, "gate"): y[1:]})))
    for row in calibration.rows:
        ids = calibration.ids[None, row]
        model.model.predict_further(model.model(ids).last_hidden_state, ids)
        for index, total in sums.items():
            experts = model.model.layers[index].mlp.experts
            residual, (inputs, block), (weights, chosen) = seen[index, "h"], seen[index, "mlp"], seen[index, "gate"]
            length = ids.shape[1] - max(0, index - num_layers + 1)
            for t in range(max(0, length)):
                h, after = residual[0, t].double(), (residual + block)[0, t].double()
                change = 1 - (h @ after) / (h.norm() * after.norm())
                for g, j in zip(weights[t].double(), chosen[t].tolist(), strict=True):
                    gate, up = (experts.gate_up_proj[j] @ inputs[0, t]).chunk(2)
                    norm = (experts.down_proj[j] @ (torch.nn.functional.silu(gate) * up)).double().norm()
                    values = torch.stack((torch.ones_like(g), g, g * norm, norm, norm**2, g * norm * change))
                    total[calibration.source[row.start + t], j] += values
    for hook in hooks:
        hook.remove()
    return sums


def test_sums_equal_slow_loops(case, checkpoint):
    family, overrides = case
    folder, calibration = checkpoint(family, **overrides), tokens_in_rows()
    expected = slow_sums(folder, calibration)
    found = prune.measure(LayerByLayer(folder, torch.float32), calibration).sums
    assert found.keys() == expected.keys()
    assert len(found) == 2 + tiny.FAMILIES[family].get("num_nextn_predict_layers", 0)
    for index, sums in expected.items():
        assert sums[..., 0].sum() > 0
        for number, field in enumerate(FIELDS):
            size = sums[..., number].max().item()
            assert_close(found[index][..., number], sums[..., number], f"layer {index} {field}", 1e-5 * size, 1e-4)


def test_loss_is_the_models(checkpoint):
    folder, calibration = checkpoint("v3"), tokens_in_rows()
    model = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    for row in calibration.rows:
        ids = calibration.ids[None, row]
        losses += [model(ids, labels=ids).loss.item()] * (ids.shape[1] - 1)
    found = prune.measure(LayerByLayer(folder, torch.float32), calibration)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_scores_by_hand():
    """Two files, three experts; 6 numbers of each: tokens, g, g|f|, |f|, |f|^2, g|f|(1 - cos)."""
    sums = torch.tensor(
        [
            [[2, 0.5, 3, 8, 40, 0.1], [1, 0.2, 4, 5, 25, 0.9], [0] * 6],
            [[2, 0.5, 5, 4, 16, 0.3], [1, 0.3, 4, 5, 25, 0.1], [0] * 6],
        ],
        dtype=torch.float64,
    )
    expected = {
        "frequency": [4, 2, 0],
        "reap": [2, 4, 0],
        "man": [3, 5, 0],
        "msan": [14, 25, 0],
        "easy-ep": [0.4, 1, 0],
    }
    assert expected.keys() == SCORES.keys()
    for name, values in expected.items():
        assert_close(score(sums, name), torch.tensor(values, dtype=torch.float64), name)


def test_choice_keeps_groups_equal_and_order():
    scores = torch.tensor([5.0, 9, 1, 7, 0, 0, 2, 1])
    assert choose(scores, 4, 1) == [0, 1, 3, 6]
    assert choose(scores, 4, 2) == [1, 3, 6, 7]
    assert choose(torch.zeros(4), 2, 2) == [0, 2]  # of equal ones the first


def prune_folder(folder, output, keep: int, score_name: str = "reap", **settings):
    """Through the functions, on random tokens: a tiny checkpoint has no tokenizer. -> the experts kept by layer"""
    config = json.loads((folder / "config.json").read_text())
    model = LayerByLayer(folder, torch.float32)
    measurement = prune.measure(model, tokens_in_rows(**settings))
    kept = {i: choose(score(s, score_name), keep, model.config.n_group) for i, s in measurement.sums.items()}
    source = rewrite.Source(folder)
    job = rewrite.Job(output, {})
    job.write_shards(source, prune.Pruning(source, kept, model.config, model.num_layers).change, "writing")
    job.finish(folder, prune.pruned_config(config, keep, model.config.num_nextn_predict_layers), "Pruned.")
    return kept


def mask_routers(model, kept: dict[int, list[int]]):
    """Routers that never choose an expert which is not kept, and share the scores out among the others."""
    for index, experts in kept.items():
        router = model.model.layers[index].mlp.gate
        gone = torch.ones(router.weight.shape[0], dtype=torch.bool)
        gone[experts] = False

        def forward(x, token_ids, router=router, gone=gone):
            logits = (x.float() @ router.weight.float().T).masked_fill(gone, float("-inf"))
            scores = router.score(logits)
            indices = router.select(scores.masked_fill(gone, float("-inf")), router, token_ids)
            weights = scores.gather(-1, indices)
            if router.norm_topk_prob:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            return logits, weights * router.routed_scaling_factor, indices

        router.forward = forward


@torch.no_grad()
def test_equals_the_original_with_a_masked_router(case, checkpoint, tmp_path):
    family, overrides = case
    folder = checkpoint(family, **overrides)
    kept = prune_folder(folder, tmp_path / "pruned", 12)
    assert any(experts != list(range(12)) for experts in kept.values())
    original = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=True, dtype=torch.float32)
    assert pruned.config.n_routed_experts == 12
    tokens = tiny.make_tokens(2, 50, seed=3)
    unmasked = original(tokens).logits
    mask_routers(original, kept)
    expected, found = (model.model(tokens).last_hidden_state for model in (original, pruned.eval()))
    assert_close(found, expected, "states", atol=2e-5, rtol=0)
    assert (original(tokens).logits - unmasked).abs().max() > 1e-2  # what went mattered
    further = [model.model.predict_further(expected, tokens)[0] for model in (original, pruned)]
    assert len(further[0]) == tiny.FAMILIES[family].get("num_nextn_predict_layers", 0)
    for one, other in zip(*further, strict=True):
        assert_close(one, other, "states of a prediction module", atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "native"),
    [("v2_lite", DeepseekV2ForCausalLM), ("v2", DeepseekV2ForCausalLM), ("v3", DeepseekV3ForCausalLM)],
)
@torch.no_grad()
def test_native_class_reads_it(family, native, checkpoint, tmp_path):
    prune_folder(checkpoint(family, n_routed_experts=16), tmp_path / "pruned", 12)
    ours = DeepseekForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    theirs, report = native.from_pretrained(tmp_path / "pruned", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] | report["mismatched_keys"]
    tokens = tiny.make_tokens(2, 40)
    assert_close(theirs.eval()(tokens).logits, ours(tokens).logits, "logits")


def to_fp8(folder):
    """Stores the matrices of a checkpoint in FP8 blocks, with scales."""
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = tensor
        if tensor.ndim == 2 and not any(
            part in name for part in ("embed", "lm_head", "mlp.gate.", "eh_proj", "indexer")
        ):
            scale = torch.rand(-(-tensor.shape[0] // BLOCK), -(-tensor.shape[1] // BLOCK)) / 100
            stored[name] = (tensor * 100).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"}
    (folder / "config.json").write_text(json.dumps(config))


def contents(folder) -> dict[str, tuple]:
    """Tensor name -> dtype, shape and bytes, read without any of our code."""
    found = {}
    for shard in folder.glob("*.safetensors"):
        data = shard.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        for name, entry in header.items():
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = (entry["dtype"], entry["shape"], data[start:end])
    return found


@pytest.mark.parametrize("family", ["v3", "v32"])
def test_bytes_of_what_stays_are_copied(family, checkpoint, tmp_path):
    folder = checkpoint(family, n_routed_experts=16, hidden_size=160, moe_intermediate_size=144)
    to_fp8(folder)
    kept = prune_folder(folder, tmp_path / "pruned", 12)
    before, after = contents(folder), contents(tmp_path / "pruned")
    assert {entry[0] for entry in after.values()} >= {"F8_E4M3", "F32"}
    expected = {}
    for name, (dtype, shape, data) in before.items():
        parts = name.split(".")
        if ".mlp.experts." in name:
            layer, expert = int(parts[2]), int(parts[5])
            if expert in kept[layer]:
                parts[5] = str(kept[layer].index(expert))
                expected[".".join(parts)] = (dtype, shape, data)
        elif ".mlp.gate." in name:
            rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(16, -1)[kept[int(parts[2])]]
            expected[name] = (dtype, [12, *shape[1:]], rows.numpy().tobytes())
        else:
            expected[name] = (dtype, shape, data)
    assert after.keys() == expected.keys()
    assert all(after[name] == expected[name] for name in expected)
    assert any("scale_inv" in name and ".experts.11." in name for name in after)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [BLOCK, BLOCK]
    DeepseekForCausalLM.from_pretrained(tmp_path / "pruned")


def test_fp8_is_measured_as_what_it_means(checkpoint):
    folder = checkpoint("v3", n_routed_experts=16, hidden_size=160, moe_intermediate_size=144)
    to_fp8(folder)
    expected, found = slow_sums(folder, tokens_in_rows()), prune.measure(LayerByLayer(folder), tokens_in_rows()).sums
    for index, sums in expected.items():
        assert_close(found[index], sums, f"layer {index}", atol=1e-4 * sums.max().item(), rtol=1e-4)


# ---------------------------------------------------------------- the command


@pytest.fixture
def model(checkpoint):
    """A V3 folder with a tokenizer, in several shards."""
    folder = checkpoint("v3", n_routed_experts=16, vocab_size=tiny_chat.VOCAB_SIZE, max_position_embeddings=512)
    whole = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole.save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return tiny_chat.add_tokenizer(folder)


@pytest.fixture
def texts(tmp_path):
    """English and Chinese, plain and as a conversation."""
    plain = tmp_path / "plain.txt"
    plain.write_text("Three and four are seven, and seven and eight are fifteen. " * 40)
    chat = tmp_path / "chat.jsonl"
    row = {
        "messages": [
            {"role": "user", "content": "三加四等于多少？"},
            {"role": "assistant", "content": "三加四等于七。"},
        ]
    }
    chat.write_text("".join(json.dumps(row) + "\n" for _ in range(30)))
    return [str(plain), str(chat)]


def run(model, output, texts, *more) -> int:
    return prune.main(
        [
            "--model",
            str(model),
            "--output",
            str(output),
            "--keep",
            "0.75",
            "--calibration",
            *texts,
            "--tokens",
            "800",
            *more,
        ]
    )


def test_command(model, texts, tmp_path, capsys):
    assert run(model, tmp_path / "out", texts, "--score", "man", "--unseen", "drop") == 0
    printed = capsys.readouterr().out
    assert "routing weight" in printed
    assert not (tmp_path / "out.part").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.config.n_routed_experts == 12
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert [file["language"] for file in record["files"]] == ["not Chinese", "Chinese"]
    assert [file["name"] for file in record["files"]] == ["plain", "chat"]
    assert record["layers"].keys() == {"1", "2", "3"}
    html = (tmp_path / "out" / "pruning.html").read_text()
    assert html.count("data:image/png") == 2
    sizes = next(line for line in printed.splitlines() if line.startswith("on disk")).split()
    on_disk = sum(len(entry[2]) for entry in contents(tmp_path / "out").values())
    assert float(sizes[4]) == round(on_disk / 1e9, 3)


def test_interrupted_and_resumed(model, texts, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the third layer and a full disk while the second shard is written: nothing is lost, nothing is other."""
    assert run(model, tmp_path / "whole", texts, "--unseen", "drop") == 0
    ran, original = [], LayerByLayer.run

    def stop_in_third(self, index, *arguments, **named):
        if index == 2 and not ran.count(2):
            ran.append(2)
            raise KeyboardInterrupt
        ran.append(index)
        return original(self, index, *arguments, **named)

    monkeypatch.setattr(LayerByLayer, "run", stop_in_third)
    output = tmp_path / "out"
    assert run(model, output, texts, "--unseen", "drop") == 2
    assert "Interrupted. What is done is kept" in capsys.readouterr().err
    assert not output.exists()

    written, write = [], rewrite._write_shard

    def fill_disk(path, tensors):
        if len(written) == 1:
            written.append(None)
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path.name)
        write(path, tensors)

    monkeypatch.setattr(rewrite, "_write_shard", fill_disk)
    assert run(model, output, texts, "--unseen", "drop") == 2
    assert "disk is full" in capsys.readouterr().err
    assert run(model, output, texts, "--unseen", "drop") == 0
    assert ran == [0, 1, 2, 2, 3]  # no layer twice
    shards = sorted(path.name for path in output.glob("*.safetensors"))
    assert sorted(name for name in written if name) == shards  # nor a shard
    for name in (*shards, "config.json", "model.safetensors.index.json", "pruning.json"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_unfinished_work_of_other_options_is_not_mixed(model, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LayerByLayer, "run", lambda *arguments, **named: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(model, tmp_path / "out", texts) == 2
    monkeypatch.undo()
    assert run(model, tmp_path / "out", texts, "--score", "msan") == 2
    assert "other values of score" in capsys.readouterr().err


def test_experts_that_saw_no_token_are_named(model, texts, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("seven")
    assert run(model, tmp_path / "out", [str(short)]) == 2
    error = capsys.readouterr().err
    assert "too short" in error
    assert "--unseen drop" in error
    assert not (tmp_path / "out").exists()
    assert run(model, tmp_path / "out", [str(short)], "--unseen", "drop") == 0


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        ("0.7", "11.2 of 16.*multiples of 4 from 8 to 12.*Nearest: 8 and 12"),
        ("10", "multiples of 4 from 8 to 12"),
        ("16", "multiples of 4"),
        ("1", "multiples of 4"),
        ("-4", "multiples of 4"),
        ("many", "must be a number"),
    ],
)
def test_impossible_numbers_name_the_possible(keep, told):
    config = tiny.make_config("v3", n_routed_experts=16).to_dict()
    with pytest.raises(ValueError, match=told):
        prune.experts_to_keep(keep, config)


@pytest.mark.parametrize(("keep", "number"), [("0.75", 12), ("12", 12), ("0.5", 8)])
def test_possible_numbers(keep, number):
    assert prune.experts_to_keep(keep, tiny.make_config("v3", n_routed_experts=16).to_dict()) == number


def test_as_few_as_a_token_visits():
    """Three of eight, where nothing else forbids it."""
    assert prune.possible_counts(tiny.make_config("deepseek").to_dict()) == range(3, 8)
    with pytest.raises(ValueError, match="no routed experts"):
        prune.possible_counts(tiny.make_config("llama").to_dict())


def test_dry_run_reads_no_weights(model, monkeypatch, capsys):
    monkeypatch.setattr(rewrite, "_read_ranges", None)
    monkeypatch.setattr(prune, "LayerByLayer", None)
    assert prune.main(["--model", str(model), "--keep", "8", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    before = sum(len(entry[2]) for entry in contents(model).values())
    assert f"{before / 1e9:.3f}" in printed
    assert "active for a token" in printed


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "--output and --calibration are missing"),
        (["--output", "{new}"], "--output and --calibration are missing"),
        (["--output", "{old}", "--calibration", "{text}"], "exists already"),
        (["--output", "{new}", "--calibration", "nowhere.txt"], "nowhere.txt"),
        (["--output", "{new}", "--calibration", "{text}", "--tokenizer", "nowhere"], "nowhere"),
        (["--output", "{new}", "--calibration", "{text}", "--tokens", "0"], "--tokens is 0"),
        (["--output", "{new}", "--calibration", "{text}", "--device", "cuda:99"], "--device is 'cuda:99'"),
        (["--dry-run", "--context-tokens", "1"], "--context-tokens 1"),
        (["--dry-run", "--device", "toaster"], "--device is 'toaster'"),
    ],
)
def test_nothing_is_printed_before_all_input_is_checked(options, told, model, texts, tmp_path, capsys):
    places = {"new": tmp_path / "out", "old": model, "text": texts[0]}
    given = [option.format(**places) for option in options]
    assert prune.main(["--model", str(model), "--keep", "8", *given]) == 2
    printed = capsys.readouterr()
    assert told in printed.err
    assert printed.out == ""


def test_tokenizer_of_another_model(model, texts, tmp_path, capsys):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    assert run(model, tmp_path / "out", texts) == 2
    assert "`eos_token_id` is 5 in config.json and 1 in the tokenizer" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tokenizer of another model"):
        check_tokenizer(range(200), tiny.make_config("v3"))


def test_disk_too_small(model, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    assert run(model, tmp_path / "out", texts) == 2
    assert "will need" in capsys.readouterr().err
    assert not (tmp_path / "out.part").exists()


def test_layers_that_the_config_does_not_count_are_left_out(model, texts, tmp_path, capsys):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    assert run(model, tmp_path / "out", texts, "--unseen", "drop") == 0
    assert "left out: layers [3]" in capsys.readouterr().out
    assert not any("layers.3." in name for name in contents(tmp_path / "out"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


def test_damaged_weights_are_refused(model, texts, tmp_path, capsys):
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert run(model, tmp_path / "out", texts) == 2
    assert "its header promises" in capsys.readouterr().err


def test_every_file_gives_as_much_from_all_over_it(model, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    long, short = tmp_path / "long.txt", tmp_path / "short.jsonl"
    long.write_text("".join(f"{i} and " for i in range(20000)))
    short.write_text("".join(json.dumps({"text": f"seven {i}"}) + "\n" for i in range(200)))
    found = read_calibration([long, short], tokenizer, tokens=1000, context_tokens=50)
    assert (found.source == 0).sum() == 500
    assert 490 <= (found.source == 1).sum() <= 500
    assert max(row.stop - row.start for row in found.rows) == 50
    texts = [tokenizer.decode(found.ids[row][1:]) for row in found.rows if found.source[row.start] == 0]
    numbers = [int(number) for text in texts for number in re.findall(r"\d+", text)]
    assert max(numbers) > 10000 > 5000 > min(numbers)
    again = read_calibration([long, short], tokenizer, tokens=1000, context_tokens=50)
    assert torch.equal(found.ids, again.ids)


@pytest.mark.parametrize("prunes_mtp", [True, False])
def test_a_count_that_another_tool_left_in_the_config(prunes_mtp, checkpoint, tmp_path):
    """As llm-compressor leaves it; its own class has no prediction module, ours keeps it whole."""
    folder = checkpoint("v3", n_routed_experts=16)
    prune_folder(folder, tmp_path / "pruned", 12)
    path = tmp_path / "pruned" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_routed_experts": 16}))
    if not prunes_mtp:
        whole, tensors = load_file(folder / "model.safetensors"), load_file(path.with_name("model.safetensors"))
        tensors |= {name: tensor for name, tensor in whole.items() if "layers.3." in name}
        save_file(tensors, path.with_name("model.safetensors"), metadata={"format": "pt"})
    told = "`n_routed_experts` is 16, but every router .* 12 experts.*Set `n_routed_experts` to 12 in config.json"
    with pytest.raises(ValueError, match=told + ("; or" if prunes_mtp else ", and `num_nextn_predict_layers` to 0")):
        DeepseekForCausalLM.from_pretrained(tmp_path / "pruned")
    remedy = {"n_routed_experts": 12} | ({} if prunes_mtp else {"num_nextn_predict_layers": 0})
    path.write_text(json.dumps(json.loads(path.read_text()) | remedy))
    assert DeepseekForCausalLM.from_pretrained(tmp_path / "pruned").config.n_routed_experts == 12
