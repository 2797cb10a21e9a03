"""A chat client in a few lines: asks a server (examples/serve.sh) and shows the answer as it is written.

python examples/chat_client.py "What is a door?" --base-url http://localhost:8000/v1
"""

import argparse
import os

from openai import OpenAI


def main() -> None:
    """Ask, and show."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("question")
    parser.add_argument("--base-url", default="http://localhost:8000/v1", help="of the server (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=200, help="longest answer, in tokens (%(default)s)")
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": args.question}],
        max_tokens=args.max_tokens,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
