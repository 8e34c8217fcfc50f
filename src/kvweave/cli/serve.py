"""`kvweave serve`: an OpenAI endpoint on one machine, contexts compressed."""

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from kvweave.cli import console, options
from kvweave.cli.console import BadInput, bad_input
from kvweave.cli.gateway import DECODER_KEY, gateway

if TYPE_CHECKING:
    from kvweave.serve.keys import Keys
    from kvweave.serve.limits import Offers

_KEYS = "KVWEAVE_API_KEYS"
ENGINES = ("kvweave", "vllm")
PROBES = ("none", "template", "replay", "default")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    context: typer.Context,
    model: options.ModelName = "lab",
    name: Annotated[
        str | None, typer.Option(help="By which requests call the model.", show_default="as --model")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME or NAME:option=value,...; repeatable: what requests may name. The first is the default.",
            show_default="weave:form=even, of vLLM weave:form=even,defer=0",
        ),
    ] = None,
    budget: Annotated[str, typer.Option(help="What stays where a request does not say: a share, or tokens.")] = "0.2",
    least_budget: Annotated[float, typer.Option(help="Least share of a prompt that a request may name.")] = 0.01,
    most_budget: Annotated[float, typer.Option(help="Largest share of a prompt that a request may name.")] = 1.0,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(help="File with a key a line.", show_default=f"the variable {_KEYS}, commas between"),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            **options.NUMBER,
            help="Servers on this machine behind one address; each loads the model.",
            show_default="1, or none beside --replica",
        ),
    ] = None,
    replica: Annotated[
        list[str] | None,
        typer.Option(help="URL of a kvweave serve elsewhere, with the same keys; repeatable.", show_default="none"),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="Who decodes: kvweave, or vllm, which goes on from what kvweave has read and cut.")
    ] = "kvweave",
    decoders: Annotated[
        int | None,
        typer.Option(
            **options.NUMBER,
            help="vLLM servers on this machine, of --engine vllm.",
            show_default="1, or none beside --decoder",
        ),
    ] = None,
    decoder: Annotated[
        list[str] | None,
        typer.Option(help="URL of a vLLM server elsewhere that knows --handoff; repeatable.", show_default="none"),
    ] = None,
    handoff: Annotated[
        Path | None,
        typer.Option(help="Folder that kvweave and vLLM share.", show_default="a temporary one; none with --decoder"),
    ] = None,
    vllm: Annotated[
        str | None,
        typer.Option(help="Command that starts vLLM, and options of its own.", show_default="vLLM's own module"),
    ] = None,
    rows: Annotated[int, typer.Option(**options.COUNT, help="Replies that are decoded at a time.")] = 32,
    queue: Annotated[
        int, typer.Option(**options.NUMBER, help="Requests that wait; more are told to come back.")
    ] = 256,
    memory: Annotated[str, typer.Option(help="For keys and values of replies that are decoded.")] = "2GiB",
    prompt_tokens: Annotated[
        int | None,
        typer.Option(**options.COUNT, help="Of a prompt at most.", show_default="as the model has positions"),
    ] = None,
    new_tokens: Annotated[int, typer.Option(**options.COUNT, help="Of a reply at most.")] = 1024,
    images: Annotated[int, typer.Option(**options.NUMBER, help="In a request at most.")] = 32,
    image_host: Annotated[
        list[str] | None,
        typer.Option(
            help="HOST, HOST:PORT or HOST=ADDRESS that images may be fetched from; repeatable.", show_default="none"
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder where contexts survive a restart.", show_default="none: they do not")
    ] = None,
    context_probes: Annotated[
        str,
        typer.Option(
            help="What the model is asked about a context before its cut: none (but what the method asks by itself), "
            "template, replay, default."
        ),
    ] = "none",
    contexts: Annotated[int, typer.Option(**options.NUMBER, help="Contexts of one key.")] = 64,
    context_memory: Annotated[str, typer.Option(help="For keys and values of all contexts.")] = "1GiB",
    context_seconds: Annotated[float, typer.Option(help="That a context lives after it was used last.")] = 3600.0,
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

        from kvweave.serve.limits import Limits
    _check_engine(engine, decoders, decoder, handoff)
    remote = engine == "vllm"
    offers = _offers(method, budget, least_budget, most_budget, remote)
    _check_places(image_host, data, replica, decoder)
    if replicas == 0 and not replica:
        raise BadInput("--replicas 0: allowed is 1 or more, or 0 beside --replica URL")
    if context_probes not in PROBES:
        raise BadInput(f"--context-probes {context_probes!r}: allowed is one of {', '.join(PROBES)}")
    with bad_input():
        limits = Limits(
            rows=rows,
            queue=queue,
            memory=_bytes("--memory", memory),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            images=images,
            choices=min(rows, Limits.choices),
            contexts=contexts,
            context_bytes=_bytes("--context-memory", context_memory),
            context_seconds=context_seconds,
        )
    here = (0 if replica else 1) if replicas is None else replicas
    started = (0 if decoder else 1) if remote and decoders is None else decoders or 0
    with ExitStack() as stack:
        if here != 1 or replica or started:
            application = gateway(context, stack, limits, known, here, replica or [], started)
            said = f"{here} replicas here, {len(replica or [])} elsewhere"
        else:
            from kvweave.serve.app import Server
            from kvweave.serve.remote.engine import Remote

            loaded, processor = options.load(model, dtype, device, attention, trust_remote_code)
            key = os.environ.get(DECODER_KEY, "")
            with bad_input(option="--method or --context-probes"):
                server = Server(
                    name or model,
                    loaded,
                    processor,
                    limits=limits,
                    offers=offers,
                    keys=known,
                    image_hosts=image_host or [],
                    data=data,
                    context_probes=None if context_probes == "none" else context_probes,
                    remote=Remote(decoder, handoff, key) if decoder and handoff else None,
                )
            application, alone = server.application(), server.engine.proof.alone
            said = f"replies decode one at a time, because {alone}" if alone else "replies decode together"
            said = f"{len(decoder)} decoders go on" if decoder else said
        console.err().print(f"{name or model}: {offers.default}, budget {offers.budget}; {said}")
        logging.getLogger("uvicorn.access").addFilter(lambda record: "GET /health" not in record.getMessage())
        uvicorn.run(
            application,
            host=host,
            port=port,
            log_level="info",
            server_header=False,
            timeout_graceful_shutdown=30,
        )


def _check_engine(engine: str, decoders: int | None, decoder: list[str] | None, handoff: Path | None) -> None:
    """Refuse what does not go together."""
    if engine not in ENGINES:
        raise BadInput(f"--engine {engine!r}: allowed is one of {', '.join(ENGINES)}")
    if engine != "vllm":
        for option, value in (("--decoders", decoders), ("--decoder", decoder), ("--handoff", handoff)):
            if value is not None:
                raise BadInput(f"{option} is not allowed with --engine {engine}: allowed is --engine vllm")
    elif decoder and handoff is None:
        raise BadInput("--decoder is not allowed without --handoff: allowed is the folder that its vLLM server knows")
    elif decoders == 0 and not decoder:
        raise BadInput("--decoders 0: allowed is 1 or more, or 0 beside --decoder URL")


def _offers(method: list[str] | None, budget: str, least: float, most: float, remote: bool) -> "Offers":
    from kvweave.serve.limits import DEFAULT_METHOD, DEFAULT_REMOTE, Offers

    methods = method or [DEFAULT_REMOTE if remote else DEFAULT_METHOD]
    (first, *_) = options.parse_methods(methods, budget)
    with bad_input(option="--method"):
        return Offers(methods, first.budget, least, most)


def _bytes(option: str, text: str) -> int:
    from kvweave.ops.budget import parse_bytes

    with bad_input(option=option):
        return parse_bytes(text)


def _check_places(
    image_host: list[str] | None, data: Path | None, replica: list[str] | None, decoder: list[str] | None
) -> None:
    """Refuse hosts that are none, and a folder that cannot be written to."""
    from kvweave.serve.fetch import Host

    with bad_input(option="--image-host"):
        for one in image_host or []:
            Host.parse(one)
    if data is not None:
        console.check_out(data)
    named = [("--replica", url) for url in replica or []] + [("--decoder", url) for url in decoder or []]
    for option, url in named:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise BadInput(f"{option} {url!r}: allowed is http://HOST:PORT or https://HOST:PORT")


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
        return [key for key in os.environ.get(_KEYS, "").split(",") if key]
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BadInput(f"--api-keys {str(file)!r}: {error}; allowed is a file with a key a line") from error
