"""What clients that people have can do with the server: the real clients, each feature a test.

The tests are slow. Their results are the table in docs/serving.md, which `python docs/draw_clients.py` writes.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import openai
import pytest
import test_page
import test_serve
from checks import ROOT
from test_page import Page, Script

from serving.app import Service

tokenizer, browser = test_serve.tokenizer, test_page.browser

ANSWER = "The door is open."
CELLS: dict[tuple[str, str], Callable] = {}  # (client, feature) -> what shows that the client can do it


def cell(client: str, feature: str):
    """Make a test a cell of the table."""

    def register(function: Callable) -> Callable:
        assert (client, feature) not in CELLS
        CELLS[client, feature] = function
        return function

    return register


@dataclass
class Server:
    """A server in this process, whose model writes what `script` says."""

    root: str
    script: Script
    bodies: list[dict]  # of the requests that it got
    request: pytest.FixtureRequest
    client: object = None

    @property
    def url(self) -> str:
        """As clients want it."""
        return f"{self.root}v1"


@pytest.fixture(scope="module")
def running(tokenizer):
    bodies: list[dict] = []

    class Listening(Service):
        async def _chat(self, body, request):
            bodies.append(body)
            return await super()._chat(body, request)

    with test_page.serving(tokenizer, Listening()) as (root, script):
        yield root, script, bodies


@pytest.fixture
def server(running, request):
    root, script, bodies = running
    bodies.clear()
    script.answer(ANSWER)
    return Server(root, script, bodies, request)


QUESTION = [{"role": "user", "content": "Is the door open?"}]
TOOLS = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {}}}}]
CALL = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>read<｜tool▁sep｜>{"page": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "seed": 3, "frequency_penalty": 0.5}


def abandoned(server: Server, leave: Callable[[], None]) -> None:
    """The model writes no more than a part of an answer whose client leaves."""
    server.script.answer("door ", seconds=0.01, again=300)
    leave()
    metrics = openai.OpenAI(base_url=server.root, api_key="none")
    while "serve_answers_running 0" not in metrics.get("/metrics", cast_to=str):
        time.sleep(0.05)
    assert 0 < server.script._written < 250


# ---------------------------------------------------------------- openai


def openai_chat(server: Server, messages=QUESTION, **more):
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)
    return client.chat.completions.create(model="deepseek", messages=messages, **more)


@cell("openai", "answer")
def _(server):
    answer = openai_chat(server)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(server.script.ids)


@cell("openai", "stream")
def _(server):
    chunks = list(openai_chat(server, stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 4
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == ANSWER
    assert chunks[-1].usage.completion_tokens == len(server.script.ids)


@cell("openai", "next turn")
def _(server):
    first = openai_chat(server).choices[0].message
    again = openai_chat(server, [*QUESTION, first, {"role": "user", "content": "And now?"}])
    assert again.choices[0].message.content == ANSWER
    assert again.usage.prompt_tokens_details.cached_tokens > 0


@cell("openai", "sampling")
def _(server):
    assert openai_chat(server, **SAMPLING, extra_body={"top_k": 5, "min_p": 0.1}).choices[0].message.content == ANSWER
    with pytest.raises(openai.BadRequestError) as refused:
        openai_chat(server, temperature=3)
    assert refused.value.param == "temperature"


@cell("openai", "stop texts")
def _(server):
    assert openai_chat(server, stop=[" is"]).choices[0].message.content == "The door"


@cell("openai", "thinking")
def _(server):
    server.script.answer(ANSWER, "Hm.")
    message = openai_chat(server, extra_body={"chat_template_kwargs": {"thinking": True}}).choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm.", ANSWER)


@cell("openai", "tools")
def _(server):
    server.script.answer(CALL)
    choice = openai_chat(server, tools=TOOLS).choices[0]
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("read", '{"page": 1}')
    assert choice.finish_reason == "tool_calls"
    server.script.answer(ANSWER)
    result = {"role": "tool", "tool_call_id": call.id, "content": "open"}
    message = openai_chat(server, [*QUESTION, choice.message, result], tools=TOOLS).choices[0].message
    assert (message.content, message.tool_calls) == (ANSWER, None)


@cell("openai", "JSON schema")
def _(server):
    pytest.importorskip("llguidance", reason="schemas need llguidance")
    schema = {"type": "object", "properties": {"open": {"type": "boolean"}}, "required": ["open"]}
    server.script.answer('{"open": true}')
    form = {"type": "json_schema", "json_schema": {"name": "door", "schema": schema}}
    assert json.loads(openai_chat(server, response_format=form).choices[0].message.content) == {"open": True}


@cell("openai", "n")
def _(server):
    assert [choice.message.content for choice in openai_chat(server, n=3).choices] == [ANSWER] * 3


@cell("openai", "logprobs")
def _(server):
    scores = openai_chat(server, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert "".join(entry.token for entry in scores) == ANSWER
    assert all(entry.logprob > -0.1 and len(entry.top_logprobs) == 2 for entry in scores)


@cell("openai", "unknown model")
def _(server):
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="other", messages=QUESTION)
    assert refused.value.code == "model_not_found"


@cell("openai", "leaving")
def _(server):
    def leave():
        stream = openai_chat(server, stream=True)
        next(iter(stream))
        stream.close()

    abandoned(server, leave)


# ---------------------------------------------------------------- huggingface_hub


def hub_chat(server: Server, messages=QUESTION, **more):
    server.client = hub_client(server)  # kept: one that nobody holds closes its streams
    return server.client.chat_completion(messages, model="deepseek", **more)


def hub_client(server: Server):
    from huggingface_hub import InferenceClient

    # Offline, as the tests are, it would refuse servers of this machine as well.
    server.request.getfixturevalue("monkeypatch").setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return InferenceClient(base_url=server.url, timeout=60)


@cell("huggingface_hub", "answer")
def _(server):
    answer = hub_chat(server)
    assert answer.choices[0].message.content == ANSWER
    assert answer.usage.completion_tokens == len(server.script.ids)


@cell("huggingface_hub", "stream")
def _(server):
    chunks = list(hub_chat(server, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == ANSWER
    assert chunks[-1].usage.completion_tokens == len(server.script.ids)


@cell("huggingface_hub", "next turn")
def _(server):
    first = hub_chat(server).choices[0].message
    again = hub_chat(server, [*QUESTION, first, {"role": "user", "content": "And now?"}])
    assert again.choices[0].message.content == ANSWER
    assert again.usage["prompt_tokens_details"]["cached_tokens"] > 0


@cell("huggingface_hub", "sampling")
def _(server):
    assert hub_chat(server, **SAMPLING, extra_body={"top_k": 5}).choices[0].message.content == ANSWER
    assert server.bodies[-1]["temperature"] == SAMPLING["temperature"]


@cell("huggingface_hub", "stop texts")
def _(server):
    assert hub_chat(server, stop=[" is"]).choices[0].message.content == "The door"


@cell("huggingface_hub", "thinking")
def _(server):
    server.script.answer(ANSWER, "Hm.")
    message = hub_chat(server, extra_body={"chat_template_kwargs": {"thinking": True}}).choices[0].message
    assert (message["reasoning_content"], message.content) == ("Hm.", ANSWER)


@cell("huggingface_hub", "tools")
def _(server):
    server.script.answer(CALL)
    choice = hub_chat(server, tools=TOOLS, tool_choice="auto").choices[0]
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("read", '{"page": 1}')


@cell("huggingface_hub", "n")
def _(server):
    assert [choice.message.content for choice in hub_chat(server, n=3).choices] == [ANSWER] * 3


@cell("huggingface_hub", "logprobs")
def _(server):
    scores = hub_chat(server, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert "".join(entry.token for entry in scores) == ANSWER


@cell("huggingface_hub", "unknown model")
def _(server):
    from huggingface_hub.errors import HfHubHTTPError

    with pytest.raises(HfHubHTTPError, match="404"):
        hub_client(server).chat_completion(QUESTION, model="other")


@cell("huggingface_hub", "leaving")
def _(server):
    def leave():
        stream = hub_chat(server, stream=True)
        next(stream)
        stream.close()

    abandoned(server, leave)


# ---------------------------------------------------------------- transformers chat


def transformers_chat(server: Server, typed: str, *flags: str, model: str = "deepseek") -> subprocess.CompletedProcess:
    """`transformers chat`, at which somebody types."""
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "chat", model]
    # Offline, as the tests are, it would refuse servers of this machine as well.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment |= {"COLUMNS": "100", "TERM": "dumb"}
    return subprocess.run(
        [*command, server.url, *flags],
        input=typed,
        env=environment,
        cwd=server.request.getfixturevalue("tmp_path"),
        capture_output=True,
        text=True,
        timeout=280,
    )


@cell("transformers chat", "stream")
def _(server):
    done = transformers_chat(server, "Is the door open?\n!exit\n")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "deepseek was already loaded" in done.stdout
    assert ANSWER in done.stdout
    (body,) = server.bodies
    assert body["stream"] is True
    assert json.loads(body["generation_config"])["max_new_tokens"] == 256


@cell("transformers chat", "next turn")
def _(server):
    done = transformers_chat(server, "Is the door open?\nAnd now?\n!exit\n")
    assert done.stdout.count(ANSWER) == 2, done.stderr[-2000:]
    assert [message["content"] for message in server.bodies[1]["messages"]] == [
        "Is the door open?",
        ANSWER,
        "And now?",
    ]


@cell("transformers chat", "sampling")
def _(server):
    typed = "Is the door open?\nn\n!set max_new_tokens=64\nIs the door open?\n!exit\n"  # n: do not go on
    done = transformers_chat(server, typed, "max_new_tokens=2", "temperature=0.5", "top_k=9")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("stopped after reaching the token limit") == 1
    assert done.stdout.count(ANSWER) == 1


@cell("transformers chat", "unknown model")
def _(server):
    done = transformers_chat(server, "Is the door open?\n!exit\n", model="other")
    assert done.returncode != 0
    assert "404" in done.stderr
    assert not server.bodies


# ---------------------------------------------------------------- lm_eval


def lm_eval_chat(server: Server, **settings) -> str:
    pytest.importorskip("tenacity", reason="lm-eval's API models need lm_eval[api]")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion

    model = LocalChatCompletion(base_url=f"{server.url}/chat/completions", model="deepseek")
    chat = model.apply_chat_template(QUESTION)
    (text,) = model.generate_until([Instance("generate_until", {}, (chat, {"max_gen_toks": 64, **settings}), 0)])
    return text


@cell("lm_eval", "answer")
def _(server):
    assert lm_eval_chat(server) == ANSWER


@cell("lm_eval", "stop texts")
def _(server):
    assert lm_eval_chat(server, until=[" is"]) == "The door"


@cell("lm_eval", "logprobs")
def _(server):
    """As scores of whole tasks: those of `--model hf`."""
    arguments = (server.request.getfixturevalue(name) for name in ("tokenizer", "tmp_path"))
    tokenizer, folder = arguments
    test_serve.test_scores_of_lm_eval_are_those_of_the_model_itself(tokenizer, True, folder)


# ---------------------------------------------------------------- curl


def curl(server: Server, *, kill_after: int | None = None, **body) -> list[str]:
    """The lines of the answer; of them only the first few if curl is to be killed then."""
    if not (program := shutil.which("curl")):
        pytest.skip("curl is not installed")
    content = json.dumps({"messages": QUESTION} | body)
    command = [program, "-sN", f"{server.url}/chat/completions", "-H", "Content-Type: application/json", "-d", content]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if len(lines) == kill_after:
                process.kill()
                break
    return lines


@cell("curl", "answer")
def _(server):
    (line,) = curl(server)
    assert json.loads(line)["choices"][0]["message"]["content"] == ANSWER


@cell("curl", "stream")
def _(server):
    lines = [line for line in curl(server, stream=True) if line]
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == ANSWER


@cell("curl", "unknown model")
def _(server):
    (line,) = curl(server, model="other")
    assert json.loads(line)["error"]["code"] == "model_not_found"


@cell("curl", "leaving")
def _(server):
    abandoned(server, lambda: curl(server, stream=True, kill_after=4))


# ---------------------------------------------------------------- the page


def opened(server: Server) -> Page:
    return Page(server.request.getfixturevalue("browser"), server.root)


@cell("chat page", "stream")
def _(server):
    page = opened(server)
    server.script.answer("door ", seconds=0.03, again=60)
    page.until(lambda: page.texts("#name") == ["deepseek"])
    page.write("Is the door open?\n")
    page.until(lambda: "door door" in "".join(page.texts(".answer > .text")))
    assert not page.find("#send").is_displayed(), "it was shown while it was written"
    page.until(lambda: page.find("#send").is_displayed())
    assert page.texts(".answer > .text") == [("door " * 60).strip()] or page.texts(".answer > .text") == ["door " * 60]


@cell("chat page", "next turn")
def _(server):
    page = opened(server)
    page.ask("Is the door open?")
    page.ask("And now?")
    assert page.texts(".answer > .text") == [ANSWER] * 2
    assert server.bodies[1]["messages"][1]["content"] == ANSWER


@cell("chat page", "thinking")
def _(server):
    page = opened(server)
    server.script.answer(ANSWER, "Hm.")
    page.find("#thinking").click()
    page.ask("Is the door open?")
    assert (page.texts("details .text"), page.texts(".answer > .text")) == (["Hm."], [ANSWER])


@cell("chat page", "leaving")
def _(server):
    page = opened(server)
    page.until(lambda: page.texts("#name") == ["deepseek"])

    def leave():
        page.write("Is the door open?\n")
        page.until(lambda: "door" in "".join(page.texts(".answer > .text")))
        page.find("#stop").click()

    abandoned(server, leave)


# ---------------------------------------------------------------- the table


@pytest.mark.slow
@pytest.mark.parametrize(("client", "feature"), [pytest.param(*key, id=" | ".join(key)) for key in CELLS])
def test_a_client(client, feature, server):
    CELLS[client, feature](server)


def test_the_table_in_the_docs_has_these_cells():
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    table = text.partition("<!-- clients -->\n")[2].partition("<!-- /clients -->")[0]
    head, _, *rows = ([part.strip() for part in line[1:-1].split("|")] for line in table.splitlines())
    marks = {(row[0].split(" `")[0], name): mark for row in rows for name, mark in zip(head, row, strict=True) if mark}
    cells = {key for key, mark in marks.items() if key[1]}
    assert {marks[key] for key in cells} == {"yes"}
    assert cells == set(CELLS)
