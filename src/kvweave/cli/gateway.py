"""`kvweave serve` of several processes: a gateway, replicas that are this command once more, and vLLM servers."""

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvweave.cli.console import BadInput
from kvweave.serve.remote.vllm import DECODER_KEY, command, words

if TYPE_CHECKING:
    from kvweave.serve.keys import Keys
    from kvweave.serve.limits import Limits


def gateway(
    context: typer.Context,
    stack: ExitStack,
    limits: "Limits",
    keys: "Keys",
    here: int,
    elsewhere: Sequence[str],
    started: int,
) -> Any:
    """Several servers behind one address: those here are this command once more, each with contexts of its own.

    Without folders of the operator's, contexts outlive a replica and not the gateway.
    """
    from kvweave.serve.fleet.processes import Fleet
    from kvweave.serve.gateway.app import Gateway

    def folder(option: str) -> Path:
        return context.params[option] or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvweave-")))

    data, more = folder("data"), {}
    fleet = Fleet([], "decoder")
    if context.params["engine"] == "vllm":
        handoff = folder("handoff")
        fleet = Fleet(_decoders(context, stack, handoff, started), "decoder")
        urls = [*(context.params["decoder"] or []), *(decoder.url for decoder in fleet.all)]
        more = {"handoff": handoff, "decoders": 0, "decoder": urls}

    def replica(number: int, port: int) -> list[str]:
        own = {"replicas": 1, "replica": None, "host": "127.0.0.1", "port": port}
        return _once_more(context, **own, data=data / f"replica-{number}", **more)

    replicas: list[Any] = [*(partial(replica, number) for number in range(here)), *elsewhere]
    return Gateway(replicas, limits=limits, keys=keys, decoders=fleet).application()


def _once_more(context: typer.Context, **other: Any) -> list[str]:
    """This command as it was typed, some options changed."""
    given = context.params | other
    words = [sys.executable, "-m", "kvweave", "serve"]
    for option in context.command.params:
        value = given.get(option.name or "")
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is True:
                words.append(option.opts[0])
            elif one is not None and one is not False:
                words += [option.opts[0], str(one)]
    return words


def _decoders(
    context: typer.Context, stack: ExitStack, handoff: Path, count: int
) -> list[Callable[[int], list[str]]]:
    """Commands that start vLLM on the model's decoder, which is written for them."""
    if not count:
        return []
    given = context.params
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvweave-"))) / "decoder"
    convert = [sys.executable, "-m", "kvweave", "convert", given["model"], str(folder), "--decoder", "--no-tokenizer"]
    if subprocess.run([*convert, "--dtype", given["dtype"]], stdout=subprocess.DEVNULL).returncode:
        raise BadInput(f"--engine vllm: the decoder of --model {given['model']!r} cannot be written, as said above")
    os.environ.setdefault(DECODER_KEY, secrets.token_hex(16))
    return [partial(command, words(given["vllm"]), folder, handoff) for _ in range(count)]
