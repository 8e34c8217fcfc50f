"""`kvweave serve`: an OpenAI endpoint on one machine, contexts compressed."""

import os
from pathlib import Path
from typing import Annotated

import typer

from kvweave.cli import console, options
from kvweave.cli.console import BadInput, bad_input

_KEYS = "KVWEAVE_API_KEYS"
PROBES = ("none", "template", "replay", "default")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: options.ModelName = "lab",
    name: Annotated[
        str | None, typer.Option(help="By which requests call the model.", show_default="as --model")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME or NAME:option=value,...; repeatable: what requests may name. The first is the default.",
            show_default="weave:form=even",
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
    keys = _keys(api_keys)
    if host not in _LOOPBACK and not keys:
        raise BadInput(f"--host {host!r} without API keys: allowed is {', '.join(_LOOPBACK)}, or --api-keys FILE")
    options.check_model(model)
    console.quiet_libraries()
    with bad_input(ImportError, option="kvweave serve needs pip install 'kvweave[serve]'"):
        import uvicorn

        from kvweave.serve.app import Server
    from kvweave.ops.budget import parse_bytes
    from kvweave.serve.fetch import Host
    from kvweave.serve.keys import Keys
    from kvweave.serve.limits import DEFAULT_METHOD, Limits, Offers

    with bad_input(option="--image-host"):
        for one in image_host or []:
            Host.parse(one)
    with bad_input(option="--memory"):
        room = parse_bytes(memory)
    with bad_input(option="--context-memory"):
        memory_bytes = parse_bytes(context_memory)
    if context_probes not in PROBES:
        raise BadInput(f"--context-probes {context_probes!r}: allowed is one of {', '.join(PROBES)}")
    if data is not None:
        console.check_out(data)
    with bad_input(option="--api-keys"):
        all_keys = Keys(keys)
    (first, *_) = options.parse_methods(method or [DEFAULT_METHOD], budget)
    with bad_input(option="--method"):
        offers = Offers(method or [DEFAULT_METHOD], first.budget, least_budget, most_budget)
    with bad_input():
        limits = Limits(
            rows=rows,
            queue=queue,
            memory=room,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            images=images,
            choices=min(rows, Limits.choices),
            contexts=contexts,
            context_bytes=memory_bytes,
            context_seconds=context_seconds,
        )
    loaded, processor = options.load(model, dtype, device, attention, trust_remote_code)
    server = Server(
        name or model,
        loaded,
        processor,
        limits=limits,
        offers=offers,
        keys=all_keys,
        image_hosts=image_host or [],
        data=data,
        context_probes=None if context_probes == "none" else context_probes,
    )
    alone = server.engine.proof.alone
    console.err().print(
        f"{name or model}: {offers.default}, budget {offers.budget}; replies decode "
        + (f"one at a time, because {alone}" if alone else "together")
    )
    uvicorn.run(
        server.application(),
        host=host,
        port=port,
        log_level="info",
        server_header=False,
        timeout_graceful_shutdown=30,
    )


def _keys(file: Path | None) -> list[str]:
    """API keys, from a file or from the environment; a command line is read by everybody on the machine."""
    if file is None:
        return [key for key in os.environ.get(_KEYS, "").split(",") if key]
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BadInput(f"--api-keys {str(file)!r}: {error}; allowed is a file with a key a line") from error
