"""Decodes greedily in vLLM, in a process of its own, and prints tokens and log-probabilities as one line of JSON.

python vllm_worker.py '{"engine": {...arguments of vllm.LLM}, "prompts": [[token ids], ...], "max_tokens": 24}'
"""

import json
import sys


def main(request: dict) -> list[dict]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        enable_prefix_caching=False,
        **request["engine"],
    )
    sampling = SamplingParams(
        temperature=0,
        max_tokens=request["max_tokens"],
        ignore_eos=True,
        detokenize=False,
        logprobs=5,
        prompt_logprobs=5,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    found = []
    for result in llm.generate(prompts, sampling, use_tqdm=False):
        answer = result.outputs[0]
        places = [*result.prompt_logprobs[1:], *answer.logprobs]  # nothing predicts the first token
        found.append(
            {
                "tokens": list(answer.token_ids),
                "logprobs": [{token: entry.logprob for token, entry in place.items()} for place in places],
            }
        )
    return found


if __name__ == "__main__":  # vLLM may start processes that import this module
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))))
