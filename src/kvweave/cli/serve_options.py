"""What `kvweave serve` may be told beside what all commands may."""

from pathlib import Path
from typing import Annotated

import typer

from kvweave.cli import options

KEYS = "KVWEAVE_API_KEYS"
ENGINES = ("kvweave", "vllm")
PROBES = ("none", "template", "replay", "default")

Name = Annotated[
    str | None, typer.Option("--name", help="By which requests call the model.", show_default="as --model")
]
Method = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="NAME or NAME:option=value,...; repeatable: what requests may name. The first is the default.",
        show_default="weave:form=even",
    ),
]
Budget = Annotated[str, typer.Option("--budget", help="What stays where a request does not say: a share, or tokens.")]
LeastBudget = Annotated[
    float, typer.Option("--least-budget", help="Least share of a prompt that a request may name.")
]
MostBudget = Annotated[
    float, typer.Option("--most-budget", help="Largest share of a prompt that a request may name.")
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; others than loopback need API keys.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")]
ApiKeys = Annotated[
    Path | None,
    typer.Option("--api-keys", help="File with a key a line.", show_default=f"the variable {KEYS}, commas between"),
]
Replicas = Annotated[
    int | None,
    typer.Option(
        "--replicas",
        **options.NUMBER,
        help="Servers on this machine behind one address; each loads the model.",
        show_default="1, or none beside --replica",
    ),
]
Replica = Annotated[
    list[str] | None,
    typer.Option(
        "--replica", help="URL of a kvweave serve elsewhere, with the same keys; repeatable.", show_default="none"
    ),
]
Engine = Annotated[
    str,
    typer.Option("--engine", help="Who decodes: kvweave, or vllm, which goes on from what kvweave has read and cut."),
]
Decoders = Annotated[
    int | None,
    typer.Option(
        "--decoders",
        **options.NUMBER,
        help="vLLM servers on this machine, of --engine vllm.",
        show_default="1, or none beside --decoder",
    ),
]
Decoder = Annotated[
    list[str] | None,
    typer.Option(
        "--decoder", help="URL of a vLLM server elsewhere that knows --handoff; repeatable.", show_default="none"
    ),
]
Handoff = Annotated[
    Path | None,
    typer.Option(
        "--handoff", help="Folder that kvweave and vLLM share.", show_default="a temporary one; none with --decoder"
    ),
]
Vllm = Annotated[
    str | None,
    typer.Option(
        "--vllm", help="Command that starts vLLM, and options of its own.", show_default="vLLM's own module"
    ),
]
Rows = Annotated[int, typer.Option("--rows", **options.COUNT, help="Replies that are decoded at a time.")]
Queue = Annotated[
    int, typer.Option("--queue", **options.NUMBER, help="Requests that wait; more are told to come back.")
]
Memory = Annotated[str, typer.Option("--memory", help="For keys and values of replies that are decoded.")]
PromptTokens = Annotated[
    int | None,
    typer.Option(
        "--prompt-tokens", **options.COUNT, help="Of a prompt at most.", show_default="as the model has positions"
    ),
]
NewTokens = Annotated[int, typer.Option("--new-tokens", **options.COUNT, help="Of a reply at most.")]
Images = Annotated[int, typer.Option("--images", **options.NUMBER, help="In a request at most.")]
ImageHost = Annotated[
    list[str] | None,
    typer.Option(
        "--image-host",
        help="HOST, HOST:PORT or HOST=ADDRESS that images may be fetched from; repeatable.",
        show_default="none",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder where contexts survive a restart.", show_default="none: they do not"),
]
ContextProbes = Annotated[
    str,
    typer.Option(
        "--context-probes",
        help="What the model is asked about a context before its cut: none (but what the method asks by itself), "
        "template, replay, default.",
    ),
]
Contexts = Annotated[int, typer.Option("--contexts", **options.NUMBER, help="Contexts of one key.")]
ContextMemory = Annotated[str, typer.Option("--context-memory", help="For keys and values of all contexts.")]
ContextSeconds = Annotated[
    float, typer.Option("--context-seconds", help="That a context lives after it was used last.")
]
