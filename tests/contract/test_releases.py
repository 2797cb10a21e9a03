"""The contact with transformers: one name for the cache on every release, no deprecated use, few imports."""

import ast
import logging
import warnings

import pytest
import torch
from checks import ROOT, assert_close
from deepseek_repo import generation_deepseek
from deepseek_repo.compat_deepseek import CACHE_NAME, CACHE_NAMES
from tiny import FAMILIES, make_model, make_tokens
from transformers import DynamicCache

# What the root modules take from transformers besides compat_deepseek.py, which takes what differs between releases.
# A new name here is a new thing that may break with a release: prefer doing without it.
IMPORTED = {
    "transformers": {"initialization"},
    "transformers.activations": {"ACT2FN"},
    "transformers.cache_utils": {"Cache", "CacheLayerMixin", "DynamicCache", "DynamicLayer", "StaticLayer"},
    "transformers.configuration_utils": {"PreTrainedConfig"},
    "transformers.conversion_mapping": {"register_checkpoint_conversion_mapping"},
    "transformers.core_model_loading": {"Concatenate", "MergeModulelist", "WeightConverter"},
    "transformers.generation": {
        *("GenerateDecoderOnlyOutput", "GenerationConfig", "GenerationMixin"),
        *("LogitsProcessorList", "StoppingCriteriaList"),
    },
    "transformers.generation.logits_process": {
        *("EpsilonLogitsWarper", "EtaLogitsWarper", "MinPLogitsWarper", "SynthIDTextWatermarkLogitsProcessor"),
        *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TypicalLogitsWarper"),
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    },
    "transformers.integrations.moe": {"ALL_EXPERTS_FUNCTIONS", "use_experts_implementation"},
    "transformers.modeling_layers": {
        *("GenericForQuestionAnswering", "GenericForSequenceClassification", "GenericForTokenClassification"),
        "GradientCheckpointingLayer",
    },
    "transformers.modeling_outputs": {"ModelOutput"},
    "transformers.modeling_rope_utils": {"ROPE_INIT_FUNCTIONS", "dynamic_rope_update"},
    "transformers.modeling_utils": {"ALL_ATTENTION_FUNCTIONS", "PreTrainedModel"},
    "transformers.utils": {
        *("SAFE_WEIGHTS_INDEX_NAME", "SAFE_WEIGHTS_NAME", "cached_file", "can_return_tuple"),
        *("is_kernels_available", "logging"),
    },
    "transformers.utils.generic": {"maybe_autocast", "merge_with_config_defaults"},
    "transformers.utils.output_capturing": {"OutputRecorder", "capture_outputs"},
}


def test_root_modules_import_little_of_transformers():
    for path in sorted(ROOT.glob("*_deepseek.py")):
        if path.stem == "compat_deepseek":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "transformers":
                new = {alias.name for alias in node.names} - IMPORTED.get(node.module, set())
                assert not new, f"{path.name}, line {node.lineno}: {sorted(new)} of {node.module} are not on the list"


@pytest.mark.compatibility("`cache` and `past_key_values`")
@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_by_either_name(family, name):
    model, tokens = make_model(family), make_tokens(2, 12)
    with torch.no_grad():
        expected = model(tokens).logits
        cache = DynamicCache(config=model.config)
        first = model(tokens[:, :7], use_cache=True, **{name: cache})
        second = model.model(tokens[:, 7:], use_cache=True, **{name: cache})
        assert_close(first.logits, expected[:, :7], "first part")
        assert_close(model.lm_head(second.last_hidden_state), expected[:, 7:], "second part")
        for outputs in (first, second):
            assert getattr(outputs, name) is cache
            assert outputs[CACHE_NAME] is cache
            assert CACHE_NAME in outputs
        again = DynamicCache(config=model.config)
        settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        generated = model.generate(tokens, **{name: again}, **settings)
        assert torch.equal(generated, model.generate(tokens, **settings))
        assert again.get_seq_length() == 14


def test_continuous_batching_is_refused_by_releases_without_it(monkeypatch):
    monkeypatch.setattr(generation_deepseek, "HAS_PAGED_CACHE", False)
    with pytest.raises(ValueError, match=r"it came with 5\.19"):
        make_model("llama").init_continuous_batching()


def test_two_caches_under_two_names():
    model, tokens = make_model("llama"), make_tokens(1, 4)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(tokens, past_key_values=DynamicCache(), cache=DynamicCache())


@pytest.mark.compatibility("seven everyday uses without a warning")
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_deprecated_in_everyday_use(family, tmp_path, monkeypatch):
    """Neither in training, generating with every kind of cache and drafts, nor in saving and loading."""
    messages = []
    monkeypatch.setattr(logging.Logger, "_log", lambda self, level, text, *args, **kwargs: messages.append(str(text)))
    logging.Logger.warning_once.cache_clear()  # what another test has caused is said again
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, tokens = make_model(family), make_tokens(2, 12)
        settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        model.generate(tokens, **settings)
        model.generate(tokens, num_beams=2, **settings)
        if model.config.num_nextn_predict_layers:
            model.generate(tokens, mtp_tokens=1, return_dict_in_generate=True, **settings)
        prefix = model.make_prefix(tokens[:1, :5], progress=False)
        model.generate(**prefix.extend(tokens), **settings)
        model.train()(tokens, labels=tokens).loss.backward()
        model.save_pretrained(tmp_path)
        type(model).from_pretrained(tmp_path)
    messages += [str(warning.message) for warning in caught]
    old = [text for text in messages if "deprecat" in text.lower() or "past_key_values" in text]
    assert not old
