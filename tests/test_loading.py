"""common/loading.py: published checkpoints run in this repository's code by every command; no other code runs unasked."""

import hashlib
import json

import pytest
import torch
from tiny import FAMILIES, make_model, make_tokens
from tiny_chat import VOCAB_SIZE, add_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import chat
import serve
from common import loading
from common.remote_code import quant_method
from configuration_deepseek import DeepseekConfig
from finetune import evaluate as finetune_evaluate, merge, models
from finetune.data import write_jsonl
from finetune.lora import add_lora
from pretrain import train
from serving.app import Service
from tools import evaluate, publish

NAME = "deepseek-ai/DeepSeek-Tiny"
PUBLISHED = ("llama", "deepseek", "v2_lite", "v2", "v3", "v32", "nsa")
STUB = "raise RuntimeError('code of the checkpoint ran')\n"
AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekPublishedConfig",
    "AutoModel": "modeling_deepseek.DeepseekPublishedModel",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekPublishedForCausalLM",
}


def publish_as_deepseek_does(folder, family="v2_lite"):
    """A tiny checkpoint in `folder`, whose own code must not run."""
    folder.mkdir(parents=True)
    make_model(family, vocab_size=VOCAB_SIZE).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (folder / name).write_text(STUB)
    return add_tokenizer(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function family -> snapshot folder of `NAME`, in a cache as the Hub's client lays it out."""
    import huggingface_hub.constants
    import transformers.utils.hub

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(transformers.utils.hub, "CACHE", str(cache), raising=False)

    def fill(family="v2_lite"):
        repository = cache / f"models--{NAME.replace('/', '--')}"
        commit = hashlib.sha1(family.encode()).hexdigest()
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        return publish_as_deepseek_does(repository / "snapshots" / commit, family)

    return fill


def is_ours(model):
    return type(model) is loading.model_class()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=make_tokens(2, 12)).logits


@pytest.mark.parametrize("family", PUBLISHED)
def test_every_family_by_name(hub, family, tmp_path):
    hub(family)
    model, tokenizer = loading.load(NAME, None, trust_remote_code=False, dtype="float32")
    assert is_ours(model)
    assert len(tokenizer) <= VOCAB_SIZE
    torch.testing.assert_close(logits(model), logits(make_model(family, vocab_size=VOCAB_SIZE)))
    # What it saves opens everywhere, by its own copy of the code.
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True, dtype=torch.float32)
    torch.testing.assert_close(logits(saved), logits(model))
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["model_type"] == FAMILIES[family]["model_type"]
    assert config["auto_map"] == json.loads((loading.ROOT / "config.json").read_text())["auto_map"]


def test_a_tokenizer_that_names_no_class(hub):
    folder = hub("nsa")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert loading.load_tokenizer(NAME)("Hi")["input_ids"]


def test_a_folder_with_copies_of_this_code_runs_the_original(checkpoint):
    model = loading.load_model(checkpoint("v3"))
    assert is_ours(model)


def test_other_families_need_permission(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 16}))
    with pytest.raises(ValueError, match=r"'qwen2'.*--trust-remote-code"):
        loading.load_model(tmp_path)
    assert loading.load_config(tmp_path, trust_remote_code=True).model_type == "qwen2"


def test_permission_lets_the_code_run(tmp_path):
    with pytest.raises(RuntimeError, match="code of the checkpoint ran"):
        loading.load_config(publish_as_deepseek_does(tmp_path / "model"), trust_remote_code=True)


# ---------------------------------------------------------------- the commands


def test_fine_tuning(hub):
    hub("v3")
    model, _ = models.load_model(NAME, "float32", mtp_loss=0.1)
    assert is_ours(model)
    assert model.config.mtp_loss_weight == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("command", ["dpo", "grpo"])
def test_the_reference_model_of_full_fine_tuning(hub, tmp_path, monkeypatch, command):
    import trl.trainer.dpo_trainer
    import trl.trainer.grpo_trainer

    from finetune import dpo, grpo
    from finetune.config import DPOOptions, GRPOOptions, make_options

    hub("v3")
    module = {"dpo": trl.trainer.dpo_trainer, "grpo": trl.trainer.grpo_trainer}[command]
    create, references = module.create_model_from_path, []
    monkeypatch.setattr(
        module, "create_model_from_path", lambda *a, **k: references.append(create(*a, **k)) or references[-1]
    )
    answers = {"dpo": {"chosen": "1", "rejected": "2"}, "grpo": {"completion": "1"}}[command]
    write_jsonl([{"prompt": f"{i} + 1 = ", **answers} for i in range(20)], tmp_path / "data.jsonl")
    options = {"model": NAME, "data": [str(tmp_path / "data.jsonl")], "output": str(tmp_path / "run")}
    options |= {"method": "full", "steps": 1, "batch_size": 2, "eval_fraction": 0.3, "track": ["none"], "cpu": True}
    if command == "dpo":
        dpo.run(make_options(DPOOptions, options))
    else:
        more = {"generations": 2, "answer_tokens": 4, "kl_weight": 0.1}
        grpo.run(make_options(GRPOOptions, options | more))
    assert [is_ours(model) for model in references] == [True]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", trust_remote_code=True)


def test_fine_tuning_evaluation(hub, tmp_path, capsys):
    hub()
    write_jsonl([{"question": "1 + 1 = ?", "answer": "2"}], tmp_path / "data.jsonl")
    arguments = ["--model", NAME, "--data", str(tmp_path / "data.jsonl"), "--answer-tokens", "2"]
    assert finetune_evaluate.main(arguments) == 0
    assert "accuracy" in capsys.readouterr().out


def test_chat_and_server(hub, monkeypatch):
    hub()
    loaded, load = [], loading.load
    monkeypatch.setattr(loading, "load", lambda *arguments: loaded.append(load(*arguments)) or loaded[-1])
    assert chat.main(["--model", NAME, "--prompt", "Hi", "--max-new-tokens", "2"]) in (0, chat.CUT)
    serve.load_into(Service(), serve.parse_arguments(["--model", NAME]))
    assert [is_ours(model) for model, _ in loaded] == [True, True]


def test_merge(hub, tmp_path):
    hub()
    model, _ = loading.load(NAME, None, trust_remote_code=False)
    add_lora(model, targets=["all"], rank=2).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    output = tmp_path / "merged"
    assert merge.main(["--model", NAME, "--adapter", str(tmp_path / "adapter"), "--output", str(output)]) == 0
    assert STUB not in {file.read_text() for file in output.glob("*.py")}
    AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)


def test_task_evaluation(hub, tmp_path):
    pytest.importorskip("lm_eval")
    hub()
    (tmp_path / "text.txt").write_text("It was late. " * 5)
    assert evaluate.main([NAME, "--text", f"text={tmp_path / 'text.txt'}", "--output", str(tmp_path / "x.json")]) == 0


def test_pretraining_goes_on_from_a_published_folder(tmp_path):
    folder = publish_as_deepseek_does(tmp_path / "model", "v3")
    assert is_ours(train.build_model(folder, VOCAB_SIZE, "weights"))
    assert is_ours(train.build_model(folder, VOCAB_SIZE))


def test_publishing_tries_only_this_code(tmp_path, checkpoint):
    folder = publish_as_deepseek_does(tmp_path / "model")
    (tried,) = publish.check_loading(folder, None, False, trust_remote_code=False)
    assert tried.status == publish.FAILED
    assert "modeling_deepseek.py" in tried.text
    assert not loading.foreign_code(checkpoint("v3"))


# ---------------------------------------------------------------- what can be known before loading


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where", "runs/no/where", "a/b/", "common/nowhere"])
def test_a_folder_that_does_not_exist_is_not_asked_of_the_hub(name, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    monkeypatch.chdir(loading.ROOT)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        loading.load_config(name)
    for option in ("--model", "--adapter"):
        assert chat.main([option, name, "--prompt", "Hi"]) == 1
        assert "loading" not in capsys.readouterr().err


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotADirectoryError, match="name the folder"):
        loading.load_config(tmp_path / "config.json")


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "gpu", "mps:7", "cpus"])
def test_a_device_that_is_not_here_is_one_line(device, capsys, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert chat.main(["--device", device, "--prompt", "Hi"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: --device is '{device}'")
    assert "cpu" in error


def test_the_method_of_quantisation_is_read_from_all_forms():
    found = [quant_method(config) for config in ({}, {"quantization_config": None}, {"quantization_config": {}})]
    assert found == [None, None, "a method without a name"]
    plain, of_objects = DeepseekConfig(), DeepseekConfig()
    assert quant_method(plain) is None
    of_objects.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    assert repr(quant_method(of_objects)) == "'bitsandbytes'"
    assert quant_method(DeepseekConfig(quantization_config={"quant_method": "fp8"})) == "fp8"
