"""compress.compare: figures against direct calculation, and what is refused."""

import itertools
import json
import math

import pytest
import tiny
import tiny_chat
import torch
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from matplotlib.text import Text
from transformers import AutoTokenizer

from compress import compare


@pytest.fixture
def models(tmp_path):
    """Two V3 folders with the same tokenizer and other weights."""
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path / f"model{seed}")
        tiny.make_model("v3", vocab_size=tiny_chat.VOCAB_SIZE, seed=seed).save_pretrained(folders[-1])
        tiny_chat.add_tokenizer(folders[-1])
    return folders


@pytest.fixture
def texts(tmp_path):
    english, chinese = tmp_path / "english.txt", tmp_path / "chinese.txt"
    english.write_text("Three and four are seven.")
    chinese.write_text("三加四等于七。")
    return english, chinese


@torch.no_grad()
def test_figures(models, texts, tmp_path):
    arguments = [*map(str, (*models, models[0])), "--texts", *map(str, texts), "--output", str(tmp_path / "out")]
    assert compare.main(arguments) == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())["checkpoints"]
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    first, second = (DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in models)
    for text in texts:
        ids = torch.tensor([[*tokenizer(text.read_text())["input_ids"], tokenizer.eos_token_id]])
        p, q = (model(ids).logits[0, :-1].log_softmax(dim=-1) for model in (first, second))
        size = len(text.read_bytes())
        bits = [-x.gather(1, ids[0, 1:, None]).sum().item() / math.log(2) / size for x in (p, q)]
        kl = (p.exp() * (p - q)).sum(dim=-1).mean().item()
        assert [x["bits"][text.stem] for x in found] == pytest.approx([*bits, bits[0]], rel=1e-5)
        assert [x["kl"][text.stem] for x in found] == pytest.approx([0, kl, 0], rel=1e-5, abs=1e-9)
        assert found[2]["agreement"][text.stem] == 1
        assert found[1]["agreement"][text.stem] < 1
    assert found[0]["disk_bytes"] == sum(x.nbytes for x in first.state_dict().values())
    assert "data:image/png" in (tmp_path / "out" / "compare.html").read_text()


def test_front():
    points = [(3.0, 1.0), (1.0, 2.0), (2.0, 2.5), (4.0, 0.5), (1.0, 3.0)]
    assert compare.best_front(points) == [(1.0, 2.0), (3.0, 1.0), (4.0, 0.5)]


def test_nothing_in_the_picture_overlaps():
    """Though checkpoints are alike in size and loss, and their names long."""
    sizes = [63e6, 49e6, 17e6, 17.1e6, 11e6, 49e6]
    losses = [2.01, 2.1, 2.015, 2.014, 2.06, 2.03]
    figures = [
        compare.Figures(
            f"runs/a-checkpoint-with-a-long-name-{i}", int(size), 1, 1, 1, {"en": x, "zh": 2 * x}, None, None
        )
        for i, (size, x) in enumerate(zip(sizes, losses, strict=True))
    ]
    figure = compare.draw(figures, ["en", "zh"])
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    for first, second in itertools.combinations(boxes, 2):
        assert not first.overlaps(second)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == [f"{i + 1} a-checkpoint-with-a-long-name-{i}" for i in range(6)]
    for axis in figure.axes:
        assert [text.get_text() for text in axis.texts] == ["1", "2", "3, 4", "5", "6"]
        inside = axis.get_window_extent()
        assert not any(inside.overlaps(text.get_window_extent()) for text in figure.legends[0].get_texts())


def test_refusals(models, texts, tmp_path, capsys):
    common = ["--texts", str(texts[0]), "--output", str(tmp_path / "out")]
    assert compare.main([*map(str, models), *common, "--tasks", str(tmp_path / "one.json")]) == 2
    assert "1 files for 2 checkpoints" in capsys.readouterr().err
    config = json.loads((models[1] / "config.json").read_text())
    (models[1] / "config.json").write_text(json.dumps(config | {"bos_token_id": 7}))
    assert compare.main([*map(str, models), *common]) == 2
    assert "`bos_token_id` is 7 in config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
