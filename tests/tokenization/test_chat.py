"""The chat template: DeepSeek-V3.1's published texts, what the loss is on, and one bos."""

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = AutoTokenizer.from_pretrained(ROOT)
B, E = TOKENIZER.bos_token, TOKENIZER.eos_token


def call(name: str, arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "你好"}
ANSWER = {"role": "assistant", "content": "Hello."}
THOUGHT = {"role": "assistant", "content": "<think>hmm\nno</think>Fine."}
REASONED = {"role": "assistant", "reasoning_content": "hmm", "content": "Fine."}
CALLS = {"role": "assistant", "content": "", "tool_calls": [call("f", '{"a": 1}'), call("g", "{}")]}
LOOK = {"role": "assistant", "content": "Let me look.", "tool_calls": [call("f", '{"a": 1}')]}
RESULT = {"role": "tool", "content": "3"}
F = '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
G = "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
R = "<｜tool▁output▁begin｜>3<｜tool▁output▁end｜>"

# messages, thinking, what V3.1's published template renders with add_generation_prompt
PUBLISHED = {
    "user": ([USER], False, f"{B}<｜User｜>你好<｜Assistant｜></think>"),
    "thinking": ([USER], True, f"{B}<｜User｜>你好<｜Assistant｜><think>"),
    "systems": (
        [SYSTEM, USER, SYSTEM, ANSWER, USER],
        False,
        f"{B}Be brief.\n\nBe brief.<｜User｜>你好<｜Assistant｜></think>Hello.{E}<｜User｜>你好<｜Assistant｜></think>",
    ),
    "past reasoning": (
        [USER, THOUGHT, USER],
        True,
        f"{B}<｜User｜>你好<｜Assistant｜></think>Fine.{E}<｜User｜>你好<｜Assistant｜><think>",
    ),
    "last reasoning": ([USER, THOUGHT], True, f"{B}<｜User｜>你好<｜Assistant｜></think>Fine.{E}"),
    "calls": (
        [USER, CALLS, RESULT, RESULT],
        False,
        f"{B}<｜User｜>你好<｜Assistant｜></think><｜tool▁calls▁begin｜>{F}{G}<｜tool▁calls▁end｜>{E}{R}{R}",
    ),
    "answer after results": (
        [USER, LOOK, RESULT, ANSWER, USER],
        False,
        f"{B}<｜User｜>你好<｜Assistant｜></think>Let me look.<｜tool▁calls▁begin｜>{F}<｜tool▁calls▁end｜>{E}{R}Hello.{E}"
        "<｜User｜>你好<｜Assistant｜></think>",
    ),
    "calls after results": (
        [USER, LOOK, RESULT, LOOK, RESULT, ANSWER],
        True,
        f"{B}<｜User｜>你好<｜Assistant｜></think>"
        + f"Let me look.<｜tool▁calls▁begin｜>{F}<｜tool▁calls▁end｜>{E}{R}" * 2
        + f"Hello.{E}",
    ),
    "two answers": ([USER, ANSWER, ANSWER], False, f"{B}<｜User｜>你好<｜Assistant｜></think>Hello.{E}Hello.{E}"),
    "system alone": ([SYSTEM], False, f"{B}Be brief."),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_rendered_text_is_v31s(name):
    messages, thinking, expected = PUBLISHED[name]
    assert (
        TOKENIZER.apply_chat_template(messages, tokenize=False, thinking=thinking, add_generation_prompt=True)
        == expected
    )


def v31(messages: list[dict], thinking: bool, add_generation_prompt: bool) -> str:
    """V3.1's published template, branch by branch, as a loop in Python."""
    text, last = B + "\n\n".join(m["content"] for m in messages if m["role"] == "system"), None
    for message in messages:
        role, content = message["role"], message.get("content")
        opening = "<｜Assistant｜>" if last == "user" else ""
        if role == "user":
            text += "<｜User｜>" + content
        elif role == "tool":
            text += f"<｜tool▁output▁begin｜>{content}<｜tool▁output▁end｜>"
        elif message.get("tool_calls"):
            calls = [tool["function"] for tool in message["tool_calls"]]
            written = [
                f"<｜tool▁call▁begin｜>{c['name']}<｜tool▁sep｜>{c['arguments']}<｜tool▁call▁end｜>" for c in calls
            ]
            text += (opening and opening + "</think>") + (content or "")
            text += "<｜tool▁calls▁begin｜>" + "".join(written) + "<｜tool▁calls▁end｜>" + E
        elif role == "assistant":
            text += opening and opening + ("<think>" if message.get("prefix") and thinking else "</think>")
            text += (content if last == "tool" else content.split("</think>", 1)[-1]) + E
        if role != "system":
            last = role
    if add_generation_prompt and last == "user":
        text += "<｜Assistant｜>" + ("<think>" if thinking else "</think>")
    return text


_texts = st.sampled_from(["", "a", "hmm</think>Fine.", "<think>x</think>y</think>z", " 你\n"])
_calls = st.lists(st.sampled_from([call("f", '{"a": 1}'), call("g", "{}")]), min_size=1, max_size=2)
_messages = st.one_of(
    st.builds(
        lambda role, content: {"role": role, "content": content}, st.sampled_from(["system", "user", "tool"]), _texts
    ),
    st.builds(
        lambda content, prefix: {"role": "assistant", "content": content, "prefix": prefix}, _texts, st.booleans()
    ),
    st.builds(lambda content, calls: {"role": "assistant", "content": content, "tool_calls": calls}, _texts, _calls),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(_messages, min_size=1, max_size=6), st.booleans(), st.booleans())
def test_every_branch_is_v31s(messages, thinking, prompt):
    rendered = TOKENIZER.apply_chat_template(messages, tokenize=False, thinking=thinking, add_generation_prompt=prompt)
    assert rendered == v31(messages, thinking, prompt)


@pytest.mark.parametrize(
    ("message", "thinking", "expected"),
    [
        ({"content": "It is"}, False, "</think>It is"),
        ({"content": "Let me"}, True, "<think>Let me"),
        ({"content": "", "reasoning_content": "Let me"}, True, "<think>Let me"),
        ({"content": "It is", "reasoning_content": "Let me"}, True, "<think>Let me</think>It is"),
    ],
)
def test_answers_and_thoughts_are_continued(message, thinking, expected):
    message = {"role": "assistant", "prefix": True, **message}
    settings = {"thinking": thinking, "tokenize": False}
    rendered = TOKENIZER.apply_chat_template([USER, message], **settings)
    assert rendered == f"{B}<｜User｜>你好<｜Assistant｜>{expected}{E}"
    if message["content"]:
        rendered = TOKENIZER.apply_chat_template([USER, message], continue_final_message=True, **settings)
        assert rendered == f"{B}<｜User｜>你好<｜Assistant｜>{expected}"


def test_tools_are_described_as_in_v31s_model_card():
    parameters = {"type": "object", "properties": {"城市": {"type": "string"}}}
    tools = [
        {
            "type": "function",
            "function": {"name": "weather", "description": "Weather <now>.", "parameters": parameters},
        },
        {"type": "function", "function": {"name": "today", "description": "The date."}},
    ]
    expected = f"""{B}Be brief.

## Tools
You have access to the following tools:

### weather
Description: Weather <now>.

Parameters: {{"type": "object", "properties": {{"城市": {{"type": "string"}}}}}}

### today
Description: The date.

Parameters: {{}}

IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>{{additional_tool_calls}}<｜tool▁calls▁end｜>

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces<｜User｜>你好"""
    assert TOKENIZER.apply_chat_template([SYSTEM, USER], tools=tools, tokenize=False) == expected
    unwrapped = [tool["function"] for tool in tools]
    assert TOKENIZER.apply_chat_template([SYSTEM, USER], tools=unwrapped, tokenize=False) == expected


def test_arguments_may_be_an_object_and_content_may_be_absent():
    message = {"role": "assistant", "content": None, "tool_calls": [call("f", {"a": 1})]}
    rendered = TOKENIZER.apply_chat_template([USER, message], tokenize=False)
    assert rendered == f"{B}<｜User｜>你好<｜Assistant｜></think><｜tool▁calls▁begin｜>{F}<｜tool▁calls▁end｜>{E}"


# messages, thinking, what the assistant wrote
WRITTEN = {
    "answers": ([USER, ANSWER, USER, THOUGHT], False, [f"Hello.{E}", f"Fine.{E}"]),
    "reasoning": ([USER, REASONED, USER, REASONED], True, [f"Fine.{E}", f"hmm</think>Fine.{E}"]),
    "reasoning not asked for": ([USER, REASONED], False, [f"Fine.{E}"]),
    "calls": (
        [USER, CALLS, RESULT, ANSWER],
        False,
        [f"<｜tool▁calls▁begin｜>{F}{G}<｜tool▁calls▁end｜>{E}", f"Hello.{E}"],
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_mask_covers_what_the_assistant_wrote(name):
    messages, thinking, expected = WRITTEN[name]
    encoded = TOKENIZER.apply_chat_template(
        messages, thinking=thinking, return_dict=True, return_assistant_tokens_mask=True
    )
    runs, before = [], 0
    for token, wrote in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if wrote:
            runs = [*runs[:-1], [*runs[-1], token]] if before else [*runs, [token]]
        before = wrote
    assert [TOKENIZER.decode(run) for run in runs] == expected


@pytest.mark.parametrize("name", WRITTEN)
def test_prompt_is_the_beginning_of_the_training_text(name):
    """What a trainer shows before the last answer is what generation shows the model."""
    messages, thinking, _ = WRITTEN[name]
    prompt = TOKENIZER.apply_chat_template(
        messages[:-1], thinking=thinking, tokenize=False, add_generation_prompt=True
    )
    assert TOKENIZER.apply_chat_template(messages, thinking=thinking, tokenize=False).startswith(prompt)


def test_exactly_one_bos():
    """A rendered chat holds its bos; the tokenizer adds one to a text. So rendered text goes without special tokens."""
    messages = [SYSTEM, USER, ANSWER]
    rendered = TOKENIZER.apply_chat_template(messages, tokenize=False)
    ids = TOKENIZER.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids.count(TOKENIZER.bos_token_id) == 1
    assert ids == TOKENIZER(rendered, add_special_tokens=False)["input_ids"]
    assert ids == TOKENIZER(rendered.removeprefix(B))["input_ids"]
    assert TOKENIZER("text")["input_ids"].count(TOKENIZER.bos_token_id) == 1
    assert TOKENIZER("text", add_special_tokens=False)["input_ids"].count(TOKENIZER.bos_token_id) == 0


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "robot", "content": ""}, "robot; use system, user, assistant or tool"),
        ({"role": "user", "content": None}, "content of message 0 by user is no string"),
        ({"role": "assistant", "content": None}, "message 0 by assistant is no string"),
    ],
)
def test_bad_messages_are_refused(message, error):
    with pytest.raises(Exception, match=error):
        TOKENIZER.apply_chat_template([message], tokenize=False)
