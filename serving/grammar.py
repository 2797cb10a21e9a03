"""Answers that match a JSON schema, by llguidance (extra `structured`): tokens that would break it get no probability."""

import json

import torch
from transformers import PreTrainedTokenizerBase

from common.extras import extra
from serving.protocol import RequestError
from tokenization.plain import PlainEncoder

with extra("structured"):
    from llguidance import LLMatcher, LLTokenizer
    from llguidance.torch import allocate_token_bitmask, fill_next_token_bitmask

# Without a bound, a model that has nothing to say writes white space for ever.
_OPTIONS = {"whitespace_pattern": r"[ \n]?"}


class Grammars:
    """Compiles schemas for a model.

    Args:
        tokenizer: a byte-level tokenizer. Its control tokens are no text of an answer.
        vocab_size: of the model.
        end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_ids: list[int]):
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        described |= {"padding": None, "truncation": None}
        control_ids = PlainEncoder(tokenizer).control_ids
        for token in described["added_tokens"]:
            token["special"] = token["special"] or token["content"] in control_ids
        self._tokenizer = LLTokenizer(json.dumps(described), n_vocab=vocab_size, eos_token=end_ids)
        self._vocab_size = vocab_size
        self._think, self._thought = control_ids.get("<think>"), control_ids.get("</think>")

    def compile(self, response_format: dict) -> str:
        """The grammar of a request's `response_format`.

        Raises:
            RequestError: it is no schema, or one that is not supported.
        """
        schema = {"type": "object"}
        if response_format["type"] == "json_schema":
            described = response_format.get("json_schema")
            schema = described.get("schema") if isinstance(described, dict) else None
            if not isinstance(schema, (dict, bool)):
                raise RequestError("`response_format` has no table json_schema.schema", "response_format")
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_OPTIONS)
            problem = LLMatcher.validate_grammar(grammar, self._tokenizer)
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if problem:
            raise RequestError(
                f"`response_format` has a schema that cannot be kept: {problem[:500]}", "response_format"
            )
        return grammar

    def start(self, grammar: str, prompt_ids: list[int]) -> "Constraint":
        """Constrain the answer to a prompt; where it begins with thinking, what follows the thinking."""
        thought = self._thought if prompt_ids[-1] == self._think else None
        return Constraint(LLMatcher(self._tokenizer, grammar), self._vocab_size, thought)


class Constraint:
    """What one answer may go on with.

    Args:
        matcher: of the grammar, at its beginning.
        vocab_size: of the model.
        thought: the token after which the grammar begins; None is at once.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, thought: int | None):
        self._matcher = matcher
        self._mask = allocate_token_bitmask(1, vocab_size)
        self._thought = thought
        self._read = 0

    def __call__(self, scores: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """Logits [1, V] after the tokens [S] of the answer -> those of tokens that may not follow are -inf."""
        for id in written[self._read :].tolist():
            if self._thought is None:
                self._matcher.consume_token(id)
            elif id == self._thought:
                self._thought = None
        self._read = len(written)
        if self._thought is not None:
            return scores
        if self._matcher.is_error():
            raise RuntimeError(f"the schema could not be followed: {self._matcher.get_error()}")
        fill_next_token_bitmask(self._matcher, self._mask)
        words = self._mask.to(scores.device)  # [1, V / 32], a bit for each token
        bits = (words[:, :, None] >> torch.arange(32, device=scores.device, dtype=words.dtype)) & 1
        return scores.masked_fill(bits.flatten(1)[:, : scores.shape[1]] == 0, float("-inf"))
