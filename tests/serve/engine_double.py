"""What stands for vLLM: the same requests and answers, the same checks of contexts, decoded by transformers.

python engine_double.py --model DECODER --port PORT --kv-transfer-config JSON
"""

import argparse
import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from safetensors.torch import load_file
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from transformers import AutoModelForCausalLM, DynamicCache

from kvweave.serve.engines.handoff import ContextError, check_whole, context_of, mark_of


class EngineDouble:
    """An engine.

    Args:
        decoder: its model; root: the folder of all contexts.

    Attributes:
        asked: requests that it was sent; breaks: after how many tokens it breaks, once; None: it does not.
    """

    def __init__(self, decoder: Path, root: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(decoder).eval()
        self._mark, self._root = mark_of(str(decoder)), str(root)
        self.asked: list[dict[str, Any]] = []
        self.breaks: int | None = None

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        assert body["stream"]
        assert body["return_token_ids"]
        assert self._mark is not None
        try:
            context = context_of(
                body["kv_transfer_params"], body["cache_salt"], body["prompt"], self._root, self._mark
            )
            assert context is not None
            check_whole(context.path)
        except ContextError:
            return JSONResponse({"error": {"message": "KV load failure", "code": 500}}, 500)
        cache = DynamicCache()
        tensors = load_file(context.path)
        for layer in range(self.model.config.num_hidden_layers):
            cache.update(tensors[f"k{layer}"][None], tensors[f"v{layer}"][None], layer)
        return StreamingResponse(self._events(body, cache, context.slots), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], cache: DynamicCache, slots: int) -> AsyncGenerator[bytes, None]:
        fed = body["prompt"][slots:]
        breaks, draws = self.breaks, torch.Generator().manual_seed(body.get("seed") or 0)
        for count in range(body["max_tokens"]):
            if count == breaks:
                self.breaks = None
                raise RuntimeError("broken")
            with torch.inference_mode():
                logits = self.model(torch.tensor([fed]), past_key_values=cache).logits[0, -1].float()
            chances = logits.log_softmax(-1)
            heat = body["temperature"]
            token = int(
                chances.argmax() if not heat else torch.multinomial((logits / heat).softmax(-1), 1, generator=draws)
            )
            fed = [token]
            choice: dict[str, Any] = {"index": 0, "text": "", "token_ids": [token], "logprobs": None}
            ended = token in body["stop_token_ids"] or count + 1 == body["max_tokens"]
            choice["finish_reason"] = ("stop" if token in body["stop_token_ids"] else "length") if ended else None
            if "logprobs" in body:
                top = {f"token_id:{n}": float(x) for x, n in zip(*chances.topk(body["logprobs"]), strict=True)}
                top |= {f"token_id:{token}": float(chances[token])}  # though it is none of the likeliest
                choice["logprobs"] = {"token_logprobs": [float(chances[token])], "top_logprobs": [top]}
            yield b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
            await asyncio.sleep(0)
            if ended:
                break
        yield b"data: [DONE]\n\n"

    async def health(self) -> Response:
        return Response()

    def application(self) -> FastAPI:
        app = FastAPI()
        app.add_api_route("/v1/completions", self.complete, methods=["POST"], response_model=None)
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        return app


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", type=Path)
    arguments.add_argument("--port", type=int)
    arguments.add_argument("--kv-transfer-config", type=json.loads)
    given, _ = arguments.parse_known_args()
    torch.set_num_threads(1)
    root = Path(given.kv_transfer_config["kv_connector_extra_config"]["root"])
    uvicorn.run(EngineDouble(given.model, root).application(), port=given.port, log_level="warning")
