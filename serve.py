"""An OpenAI-compatible server for one model.

    python serve.py                                          # the model in this folder, http://localhost:8000/v1
    python serve.py --model path/or/hub-name --trust-remote-code
    python serve.py --adapter runs/my-adapter

    from openai import OpenAI
    client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
    client.chat.completions.create(model="deepseek", messages=[{"role": "user", "content": "Hello"}], stream=True)

`transformers serve` loads a checkpoint of a published type into transformers' own class, whatever `auto_map` says, lets
what users write become control tokens, and loads any model (and its code) that a request names. Here the model is the one
that was started with, chats are encoded by tokenization/safe_chat.py, answers are parsed by the ids of their tokens
(tokenization/answers.py), and requests are checked before they reach the model (serving/). In `/v1/completions` the caller
writes the whole prompt, control tokens included.
"""

import argparse
import errno
import ipaddress
import logging
import os
import socket
import sys
import threading
import time
from contextlib import suppress

from common.command import Parser, one_line_errors, run_command
from common.extras import extra

API_KEY_VARIABLE = "SERVE_API_KEY"
SHUTDOWN_SECONDS = 10  # for answers that are being written when the server is told to stop


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="serve.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    model = parser.add_argument_group("the model")
    model.add_argument("--model", help="folder or Hub name (default: the adapter's base model, or this repository)")
    model.add_argument("--adapter", help="folder or Hub name of a PEFT adapter to put on the model")
    model.add_argument("--trust-remote-code", action="store_true", help="let code that comes with the checkpoint run")
    model.add_argument(
        "--dtype", default="auto", help="of the weights, for instance float32 (default: the checkpoint's)"
    )
    model.add_argument("--device", help="for instance cpu, cuda or auto (default: cpu)")
    model.add_argument("--name", default="deepseek", help="what requests call the model (default deepseek)")
    answers = parser.add_argument_group("answers", "where a request does not say")
    answers.add_argument("--thinking", action="store_true", help="think before answering")
    answers.add_argument(
        "--temperature", type=_number(0, 2), help="of sampling, 0 to 2; 0 is greedy (default: the model's)"
    )
    network = parser.add_argument_group("the network")
    network.add_argument(
        "--host", default="localhost", help="address to listen at (default localhost); others need an API key"
    )
    network.add_argument("--port", type=_whole(1, 65535), default=8000, help="port to listen at (default 8000)")
    network.add_argument(
        "--api-key",
        help=f"what requests must bring as Authorization: Bearer; better in the environment, as {API_KEY_VARIABLE}",
    )
    network.add_argument(
        "--allowed-hosts",
        help="names for the server in requests' Host header, with commas between them (default: this machine's own "
        "names, and any with an address that is not this machine's own)",
    )
    network.add_argument("--quiet", action="store_true", help="no line for each request")
    batching = parser.add_argument_group(
        "continuous batching",
        "requests that come together share forward passes, where the model can; those with penalties, biases, min_p, "
        "seeds, logprobs or a schema are answered one after the other beside them",
    )
    batching.add_argument(
        "--continuous-batching",
        action=argparse.BooleanOptionalAction,
        help="batch requests that come alone as well, and end if the model cannot; --no-continuous-batching never batches",
    )
    batching.add_argument(
        "--cache-blocks",
        type=_whole(1, 2**31 - 1),
        help="blocks of the paged cache (default: half of an accelerator's free memory, on a CPU four texts of the "
        "model's context)",
    )
    batching.add_argument(
        "--batch-tokens",
        type=_whole(1, 2**31 - 1),
        help="most tokens of a forward pass (default: 8192, on a CPU 1024)",
    )
    alone = parser.add_argument_group("one after the other", "what is not batched, requests that come alone among it")
    alone.add_argument(
        "--kept-caches",
        type=_whole(0, 10_000),
        default=4,
        help="chats whose cache is kept, so that a next turn reads only what is new (default 4)",
    )
    return parser


def _number(low: float, high: float):
    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value

    return number


def _whole(low: int, high: int):
    def whole(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    return whole


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked among one another; `api_key` and `allowed_hosts` as the server wants them."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for option in ("cache_blocks", "batch_tokens"):
        if getattr(args, option) is not None and args.continuous_batching is False:
            parser.error(f"--{option.replace('_', '-')} is for batches; leave it or --no-continuous-batching out")
    if not args.name:
        parser.error("--name is empty; it is what requests call the model")
    key = args.api_key if args.api_key is not None else os.environ.get(API_KEY_VARIABLE)
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        parser.error("the API key must be at least one printable ASCII character, without spaces")
    if key is None and not is_loopback(args.host):
        parser.error(
            f"--host {args.host} lets other machines in; set {API_KEY_VARIABLE} in the environment (or --api-key) to "
            "what they must bring, or leave --host out"
        )
    args.api_key = key
    if args.allowed_hosts is not None:
        args.allowed_hosts = tuple(host.strip() for host in args.allowed_hosts.split(",") if host.strip())
        if not args.allowed_hosts:
            parser.error('--allowed-hosts is empty; name hosts, or "*" for any')
    return args


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets at all addresses that the host has.

    Raises:
        OSError: another program has the port, or the host is not this machine.
    """
    sockets, reason = [], None
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        try:
            listener = socket.socket(family, kind, protocol)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if os.name == "posix":  # elsewhere it would share the port with another program
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)  # now, so that a second server finds the port taken
            sockets.append(listener)
        except OSError as error:
            listener.close()
            reason = error
            if error.errno == errno.EADDRINUSE:
                break
    if reason is not None and (not sockets or reason.errno == errno.EADDRINUSE):
        for listener in sockets:
            listener.close()
        raise OSError(f"cannot listen at {host}, port {port}: {reason.strerror}; give another --host or --port")
    return sockets


# ---------------------------------------------------------------- the server


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_arguments(argv)
    sockets = listen(args.host, args.port)
    # Only now, since they take seconds: wrong arguments and a port that is taken are said at once.
    with extra("serve"):
        import uvicorn

        from serving.app import LOOPBACK_HOSTS, Service

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("serve").setLevel(logging.WARNING if args.quiet else logging.INFO)
    hosts = args.allowed_hosts or ((*LOOPBACK_HOSTS, args.host) if is_loopback(args.host) else ("*",))
    service = Service(args.name, args.thinking, args.api_key, hosts)
    # Answers are ended by the service, in their protocol; what is left a little later, by force.
    grace = SHUTDOWN_SECONDS + 2
    config = uvicorn.Config(service.app(), log_level="warning", access_log=False, timeout_graceful_shutdown=grace)
    server = uvicorn.Server(config)
    errors: list[BaseException] = []

    def prepare() -> None:
        try:
            load_into(service, args)
        except BaseException as error:
            errors.append(error)
            server.should_exit = True

    def end_answers() -> None:
        while not server.should_exit:
            time.sleep(0.2)
        if not errors:
            print(f"ending; answers that are being written have {SHUTDOWN_SECONDS} s", flush=True)
        time.sleep(SHUTDOWN_SECONDS)
        service.stop()

    print(f"loading {args.model or args.adapter or 'the model of this folder'}", flush=True)
    threading.Thread(target=prepare, daemon=True, name="load").start()
    threading.Thread(target=end_answers, daemon=True, name="stop").start()
    with suppress(KeyboardInterrupt):
        server.run(sockets=sockets)
    if errors and not isinstance(errors[0], (ValueError, OSError, RuntimeError, ImportError)):
        raise errors[0]
    if errors:
        print(f"error: {errors[0]}", file=sys.stderr)
    return 1 if errors else 0


def load_into(service, args: argparse.Namespace) -> None:
    """Load the model into the service and say how it is reached.

    Raises:
        ValueError, OSError: it cannot be loaded or served.
    """
    with extra("serve"):
        from transformers.utils import logging as transformers_logging

        from common.loading import load

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model, tokenizer = load(args.model, args.adapter, args.trust_remote_code, args.dtype, args.device)
    if args.temperature is not None:
        model.generation_config.do_sample = args.temperature > 0
        model.generation_config.temperature = args.temperature or None
    how = attach(service, model, tokenizer, args)
    count = sum(parameter.numel() for parameter in model.parameters())
    root = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{args.port}"
    address = f"{root}/v1"
    key = " -H 'Authorization: Bearer YOUR-KEY'" if args.api_key else ""
    print(
        f"serving {args.name} at {address}: {count / 1e6:,.1f} million parameters, {model.dtype} on {model.device}, "
        f"context {service.context} tokens\n"
        f"  {how}\n"
        f"  {'with' if args.api_key else 'without'} an API key; Ctrl-C ends it. Chat in a browser at {root}/ or try:\n"
        f"  curl {address}/chat/completions -H 'Content-Type: application/json'{key} "
        '-d \'{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 60}\'',
        flush=True,
    )


def attach(service, model, tokenizer, args: argparse.Namespace) -> str:
    """Serve the model, in batches where it can and nobody said otherwise -> how requests are answered, and why so.

    Raises:
        ValueError: the model's own settings cannot be kept, or batches are asked for and cannot be made.
    """
    reason = "as --no-continuous-batching says"
    if args.continuous_batching is not False:
        try:
            if not (args.continuous_batching or is_of_this_repository(model)):
                raise ValueError("the model has a class of its own, of which batches are not known to be right")
            service.attach(model, tokenizer, paging(model, args), args.kept_caches, bool(args.continuous_batching))
            if args.continuous_batching:
                return "requests share forward passes, as --continuous-batching says"
            return "a request that comes alone is answered alone; those that come together share forward passes"
        except ValueError as error:
            if args.continuous_batching:
                raise
            reason = f"without batches, since {error}"
    service.attach(model, tokenizer, None, args.kept_caches)
    return f"one request after the other, {reason}"


def is_of_this_repository(model) -> bool:
    """Whether the model, perhaps with an adapter, has the class that is tested here."""
    from common.loading import model_class

    return type(getattr(model, "get_base_model", lambda: model)()) is model_class()


def paging(model, args: argparse.Namespace):
    """Settings of the paged cache.

    Raises:
        ValueError: this release of transformers has none.
    """
    from transformers import ContinuousBatchingConfig

    # What is answered beside the batch needs memory too. On a CPU the model sizes the cache by its context.
    share = 0.5 if args.cache_blocks is None and model.device.type != "cpu" else None
    sizes = {"num_blocks": args.cache_blocks, "max_batch_tokens": args.batch_tokens, "max_memory_percent": share}
    try:
        return ContinuousBatchingConfig(**sizes, auto_switch_to_flash=False)
    except TypeError as error:  # a field is missing
        raise ValueError("this release of transformers has no paged cache for batches; it came with 5.19") from error


if __name__ == "__main__":
    run_command(main)
