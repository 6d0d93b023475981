"""`contralto serve`: vLLM's OpenAI-compatible server, configured for contrastive decoding.

    contralto serve MODEL [--adapter ADAPTER] [--marker ID] [--contrast-timeout SECONDS] [every flag of vLLM's server]

It adds the logits processor, the scheduler and the middleware of contrastive decoding, and rejects flags that are incompatible with
them. A LoRA adapter as the model, or beside it, is served under its own name, and its base under that of the base. Other requests are
served as by vLLM. The server listens on this machine alone unless `--host` is given.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from contralto.cli.flags import errors_with_flags
from contralto.cli.spellings import spelled
from contralto.common.adapters import split_adapter
from contralto.common.hub import from_pretrained, locate, remote_code
from contralto.decoding.vllm.checks import DEFAULT_TIMEOUT
from contralto.decoding.vllm.engine import cpu_options, engine_options, marker_of, server_flags
from contralto.decoding.vllm.limits import ENVIRONMENT, MIB, Limits

__all__ = ["make_parser", "prepare", "run", "warning"]

SERVER = "vllm.entrypoints.openai.api_server"
MIDDLEWARE = "contralto.decoding.vllm.middleware.PairMiddleware"
NUMBERS = (
    "api-server-count",
    "data-parallel-size",
    "long-prefill-token-threshold",
    "max-loras",
    "max-num-batched-tokens",
    "max-num-seqs",
)
TEXTS = (
    "additional-config",
    "kv-transfer-config",
    "scheduler-cls",
    "scheduling-policy",
    "spec-method",
    "spec-model",
    "spec-tokens",
    "speculative-config",
)
SWITCHES = ("enable-batch-sharded-sampling", "enable-lora")
SHORT = {"data-parallel-size": ("-dp",), "api-server-count": ("-asc",), "speculative-config": ("-sc",)}


def run(argv: Sequence[str]) -> None:
    """Check the flags, warn of an open server, and replace the process by vLLM's server.

    Args:
        argv: the flags of `contralto serve`.

    Raises:
        ValueError: flags that could schedule the branches of a completion apart.
        ImportError: vLLM is not installed.
    """
    command, settings = prepare(argv)
    if find_spec("vllm") is None:
        raise ImportError("contralto serve runs vLLM's server: pip install 'contralto[vllm]'")
    if text := warning(argv):
        print(f"contralto serve: {text}", file=sys.stderr, flush=True)
    os.environ[ENVIRONMENT] = json.dumps(settings)
    os.execv(command[0], command)


def prepare(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the command line of vLLM's server, and the settings of the middleware.

    Args:
        argv: the flags of `contralto serve`.

    Raises:
        ValueError: flags that could schedule the branches of a completion apart.

    Examples:
        >>> command, settings = prepare(["testbed:expert", "--port", "8001"])
        >>> command[1:3], command[-4:], settings["marker"], settings["timeout"]
        (['-m', 'vllm.entrypoints.openai.api_server'], ['--host', '127.0.0.1', '--port', '8001'], 0, 10.0)
        >>> prepare(["testbed:expert", "--data-parallel-size", "2"])
        Traceback (most recent call last):
            ...
        ValueError: data_parallel_size must be 1, not 2: the branches of a completion would be in different engines; start several servers, or use tensor_parallel_size
    """
    parser = make_parser()
    args, rest = parser.parse_known_args(spelled([_dashed(word) for word in argv], parser))
    given = vars(args)
    with errors_with_flags():
        given["model"], adapter = split_adapter(given["model"], given.pop("adapter"))
    if adapter is not None:
        rest = [*_lora_flags(adapter, rest), *rest]
        given["enable_lora"], given["max_loras"] = True, given["max_loras"] or 2
    model, timeout, marker = given.pop("model"), given.pop("contrast_timeout"), given.pop("marker")
    limits = {
        "timeout": timeout,
        "body": given.pop("contrast_max_body") * MIB,
        "waiting": given.pop("contrast_waiting"),
    }
    with errors_with_flags():
        Limits(**limits, held=max(Limits.held, limits["body"]))  # raises for values outside their range
    if any(word.startswith(("--speculative-config.", "--kv-transfer-config.")) for word in rest):
        raise ValueError("speculative decoding and KV connectors part the branches of a text: leave their flags out")
    if (given.pop("api_server_count") or 1) != 1:
        raise ValueError("api-server-count must be 1: the requests of a text meet in the server's one process")
    if given["additional_config"]:
        given["additional_config"] = json.loads(given["additional_config"])
    options = engine_options(timeout=timeout, **{name: value for name, value in given.items() if value is not None})
    if options.get("enable_lora"):
        options = cpu_options(options)
    if marker is None:
        with remote_code(trusted="--trust-remote-code" in rest):
            marker = _marker(model)
    command = [sys.executable, "-m", SERVER, "--model", locate(model), "--served-model-name", model]
    command += [*server_flags(options), "--middleware", MIDDLEWARE, *_address(rest), *rest]
    settings = {"marker": marker, **limits, "held": max(Limits.held, limits["body"])}
    return command, settings | {"local": _is_for_us(rest), "origins": "allowed-origins" in _listening(rest)}


def _lora_flags(adapter: str, rest: Sequence[str]) -> list[str]:
    """Return the flags that serve an adapter under its own name.

    Args:
        adapter: a folder or a hub id.
        rest: the user's flags of vLLM, which may not serve other adapters.

    Raises:
        ValueError: they do.
    """
    from contralto.decoding.vllm.adapters import lora_options

    if any(word.startswith("--lora-modules") for word in rest):
        raise ValueError("an adapter is given, and --lora-modules names others: list all of them in --lora-modules")
    folder = locate(adapter)
    if not Path(folder).is_dir():
        raise ValueError(f"vLLM serves adapters from folders, and {adapter} is none: download it first")
    rank = str(lora_options([folder])["max_lora_rank"])
    name = Path(folder).resolve().name
    return ["--lora-modules", f"{name}={folder}", *([] if "--max-lora-rank" in rest else ["--max-lora-rank", rank])]


# -------------------------------------------------------------------------------------------------------- where it listens


def _address(rest: Sequence[str]) -> list[str]:
    """Return the flags that make the server listen on localhost, unless the user sets an address."""
    return [] if {"host", "uds"} & _listening(rest).keys() else ["--host", "127.0.0.1"]


def _listening(rest: Sequence[str]) -> dict[str, Any]:
    """Return host, socket, API keys and origins from the flags and from the YAML file of vLLM's `--config`."""
    parser = argparse.ArgumentParser(prog="contralto serve", add_help=False)  # vLLM's takes abbreviations, too
    for name in ("host", "uds", "config", "allowed-origins"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--api-key", nargs="*")
    flags = {name.replace("_", "-"): v for name, v in vars(parser.parse_known_args(rest)[0]).items() if v is not None}
    file = {}
    if "config" in flags:
        from contralto.common.yaml_file import read_yaml

        file = read_yaml(flags["config"])
    return {**({_dashed(f"--{name}")[2:]: v for name, v in file.items()} if isinstance(file, dict) else {}), **flags}


def warning(argv: Sequence[str]) -> str:
    """Return a warning about a server that accepts requests from other machines without an API key.

    Args:
        argv: the flags of `contralto serve`.

    Returns:
        A sentence; an empty string for all other servers.

    Examples:
        >>> warning(["testbed:expert", "--host", "0.0.0.0"])
        'no API key is set, and 0.0.0.0 is open to other machines, all of which may use the model: set --api-key, or leave --host out'
        >>> warning(["testbed:expert", "--host", "0.0.0.0", "--api-key", "sk-1"]), warning(["testbed:expert"])
        ('', '')
    """
    options = _listening([_dashed(word) for word in argv])
    if _has_key(options) or options.get("uds") or _is_local(options.get("host", "localhost")):
        return ""
    return (
        f"no API key is set, and {options['host'] or 'an empty --host'} is open to other machines, all of which may use the model: "
        "set --api-key, or leave --host out"
    )


def _is_for_us(rest: Sequence[str]) -> bool:
    """Return whether nothing but the address keeps strangers out: it listens at a port of this machine alone, without an API key."""
    options = _listening(rest)
    return _is_local(options.get("host", "localhost")) and not options.get("uds") and not _has_key(options)


def _has_key(options: Mapping[str, Any]) -> bool:
    keys = options.get("api-key") or [os.environ.get("VLLM_API_KEY")]
    return any([keys] if isinstance(keys, str) else keys)


def _is_local(host: Any) -> bool:
    try:
        return ip_address(str(host)).is_loopback
    except ValueError:  # a name; an empty one stands for all addresses
        return str(host) == "localhost"


# ------------------------------------------------------------------------------------------------------------------ flags


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags that are not simply passed on to vLLM's server."""
    parser = argparse.ArgumentParser(
        prog="contralto serve",
        description="vLLM's OpenAI-compatible server, configured for contrastive decoding.",
        epilog="All other flags are those of vLLM's server; for several GPUs: --tensor-parallel-size N.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="a folder, a hub id, or testbed:NAME; also a LoRA adapter, with its base")
    parser.add_argument("--adapter", help="a LoRA adapter of the model, served under the name of its folder")
    parser.add_argument("--marker", type=int, help="a token that no text holds (default: found in the tokenizer)")
    parser.add_argument(
        "--contrast-timeout",
        type=float,
        default=DEFAULT_TIMEOUT,
        metavar="SECONDS",
        help=f"how long a request waits for the other branches of its text (default {DEFAULT_TIMEOUT:g})",
    )
    parser.add_argument(
        "--contrast-max-body",
        type=int,
        default=Limits.body // MIB,
        metavar="MIB",
        help=f"the largest request (default {Limits.body // MIB} MiB)",
    )
    parser.add_argument(
        "--contrast-waiting",
        type=int,
        default=Limits.waiting,
        metavar="N",
        help=f"how many requests may wait for the other branches of their completions (default {Limits.waiting})",
    )
    for name in (*NUMBERS, *TEXTS, *SWITCHES):
        kind: dict[str, Any] = {"action": "store_true", "default": None} if name in SWITCHES else {}
        kind |= {"type": int} if name in NUMBERS else {}
        parser.add_argument(f"--{name}", *SHORT.get(name, ()), help=argparse.SUPPRESS, **kind)
    return parser


def _dashed(word: str) -> str:
    """Return a flag with dashes, since vLLM also accepts underscores."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word


def _marker(model: str) -> int:
    """Return a token of a model's vocabulary that can serve as the marker."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = from_pretrained(AutoConfig, model).get_text_config()
    try:
        ends = from_pretrained(GenerationConfig, model).eos_token_id
    except OSError:  # not every model has one
        ends = config.eos_token_id
    some = ends if isinstance(ends, list) else [ends]
    return marker_of(
        from_pretrained(AutoTokenizer, model), vocabulary=config.vocab_size, ends=[e for e in some if e is not None]
    )
