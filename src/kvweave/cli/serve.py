"""`kvweave serve`: an OpenAI endpoint on one machine, contexts compressed."""

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import typer

from kvweave.cli import console, options
from kvweave.cli import serve_options as own
from kvweave.cli.console import BadInput, bad_input
from kvweave.cli.gateway import gateway
from kvweave.serve.remote.vllm import DECODER_KEY

if TYPE_CHECKING:
    from kvweave.serve.keys import Keys
    from kvweave.serve.limits import Limits, Offers

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    context: typer.Context,
    model: options.ModelName = "lab",
    name: own.Name = None,
    method: own.Method = None,
    budget: own.Budget = "0.2",
    least_budget: own.LeastBudget = 0.01,
    most_budget: own.MostBudget = 1.0,
    host: own.Host = "127.0.0.1",
    port: own.Port = 8000,
    api_keys: own.ApiKeys = None,
    replicas: own.Replicas = None,
    replica: own.Replica = None,
    engine: own.Engine = "kvweave",
    decoders: own.Decoders = None,
    decoder: own.Decoder = None,
    handoff: own.Handoff = None,
    vllm: own.Vllm = None,
    rows: own.Rows = 32,
    queue: own.Queue = 256,
    memory: own.Memory = "2GiB",
    prompt_tokens: own.PromptTokens = None,
    new_tokens: own.NewTokens = 1024,
    images: own.Images = 32,
    image_host: own.ImageHost = None,
    data: own.Data = None,
    context_probes: own.ContextProbes = "none",
    contexts: own.Contexts = 64,
    context_memory: own.ContextMemory = "1GiB",
    context_seconds: own.ContextSeconds = 3600.0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention: options.Attention = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Answer chat requests in OpenAI's form, every prompt compressed once it has been read.

    docs/SERVING.md says which methods decode together, what is limited, and how contexts are kept.
    """
    known = _known(api_keys, host)
    options.check_model(model)
    console.quiet_libraries()
    with bad_input(ImportError, option="kvweave serve needs pip install 'kvweave[serve]'"):
        import uvicorn
    given = context.params
    _check(given)
    _check_places(given)
    offers, limits = _offers(method, budget, least_budget, most_budget), _limits(given)
    here = (0 if replica else 1) if replicas is None else replicas
    started = (0 if decoder else 1) if engine == "vllm" and decoders is None else decoders or 0
    with ExitStack() as stack:
        if here != 1 or replica or started:
            application = gateway(context, stack, limits, known, here, replica or [], started)
            said = f"{here} replicas here, {len(replica or [])} elsewhere"
        else:
            application, said = _server(given, limits, offers, known)
        console.err().print(f"{name or model}: {offers.default}, budget {offers.budget}; {said}")
        logging.getLogger("uvicorn.access").addFilter(lambda record: "GET /health" not in record.getMessage())
        uvicorn.run(
            application, host=host, port=port, log_level="info", server_header=False, timeout_graceful_shutdown=30
        )


def _server(given: Mapping[str, Any], limits: "Limits", offers: "Offers", keys: "Keys") -> tuple[Any, str]:
    """One model, served by this process, and how its replies are decoded."""
    from kvweave.serve.app import Server
    from kvweave.serve.remote.engine import Remote

    model, decoder, probes = given["model"], given["decoder"] or [], given["context_probes"]
    loaded = options.load(model, given["dtype"], given["device"], given["attention"], given["trust_remote_code"])
    with bad_input(option="--method or --context-probes"):
        server = Server(
            given["name"] or model,
            *loaded,
            limits=limits,
            offers=offers,
            keys=keys,
            image_hosts=given["image_host"] or [],
            data=given["data"],
            context_probes=None if probes == "none" else probes,
            remote=Remote(decoder, given["handoff"], os.environ.get(DECODER_KEY, "")) if decoder else None,
        )
    if decoder:
        return server.application(), f"{len(decoder)} decoders go on"
    alone = server.engine.proof.alone
    said = f"replies decode one at a time, because {alone}" if alone else "replies decode together"
    return server.application(), said


def _check(given: Mapping[str, Any]) -> None:
    """Refuse what there is none of, and what does not go together."""
    engine, probes = given["engine"], given["context_probes"]
    if given["replicas"] == 0 and not given["replica"]:
        raise BadInput("--replicas 0: allowed is 1 or more, or 0 beside --replica URL")
    if probes not in own.PROBES:
        raise BadInput(f"--context-probes {probes!r}: allowed is one of {', '.join(own.PROBES)}")
    if engine not in own.ENGINES:
        raise BadInput(f"--engine {engine!r}: allowed is one of {', '.join(own.ENGINES)}")
    if engine != "vllm":
        for name in ("decoders", "decoder", "handoff"):
            if given[name] not in (None, ()):  # an option that may be repeated is ()
                raise BadInput(f"--{name} is not allowed with --engine {engine}: allowed is --engine vllm")
    elif given["decoder"] and given["handoff"] is None:
        raise BadInput("--decoder is not allowed without --handoff: allowed is the folder that its vLLM server knows")
    elif given["decoders"] == 0 and not given["decoder"]:
        raise BadInput("--decoders 0: allowed is 1 or more, or 0 beside --decoder URL")


def _offers(method: list[str] | None, budget: str, least: float, most: float) -> "Offers":
    from kvweave.serve.limits import DEFAULT_METHOD, Offers

    methods = method or [DEFAULT_METHOD]
    (first, *_) = options.parse_methods(methods, budget)
    with bad_input(option="--method"):
        return Offers(methods, first.budget, least, most)


def _limits(given: Mapping[str, Any]) -> "Limits":
    from kvweave.serve.limits import Limits

    same = ("rows", "queue", "prompt_tokens", "new_tokens", "images", "contexts", "context_seconds")
    with bad_input():
        return Limits(
            **{name: given[name] for name in same},
            choices=min(given["rows"], Limits.choices),
            memory=_bytes("--memory", given["memory"]),
            context_bytes=_bytes("--context-memory", given["context_memory"]),
        )


def _bytes(option: str, text: str) -> int:
    from kvweave.ops.budget import parse_bytes

    with bad_input(option=option):
        return parse_bytes(text)


def _check_places(given: Mapping[str, Any]) -> None:
    """Refuse hosts that are none, and a folder that cannot be written to."""
    from kvweave.serve.fetch import Host

    with bad_input(option="--image-host"):
        for one in given["image_host"] or []:
            Host.parse(one)
    if given["data"] is not None:
        console.check_out(given["data"])
    for name in ("replica", "decoder"):
        for url in given[name] or []:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
                raise BadInput(f"--{name} {url!r}: allowed is http://HOST:PORT or https://HOST:PORT")


def _known(api_keys: Path | None, host: str) -> "Keys":
    """Who may ask."""
    keys = _keys(api_keys)
    if host not in _LOOPBACK and not keys:
        raise BadInput(f"--host {host!r} without API keys: allowed is {', '.join(_LOOPBACK)}, or --api-keys FILE")
    with bad_input(ImportError, option="kvweave serve needs pip install 'kvweave[serve]'"):
        from kvweave.serve.keys import Keys
    with bad_input(option="--api-keys"):
        return Keys(keys)


def _keys(file: Path | None) -> list[str]:
    """API keys, from a file or from the environment; a command line is read by everybody on the machine."""
    if file is None:
        return [key for key in os.environ.get(own.KEYS, "").split(",") if key]
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BadInput(f"--api-keys {str(file)!r}: {error}; allowed is a file with a key a line") from error
