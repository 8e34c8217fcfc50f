"""A connector through which stock vLLM decodes on from contexts that `cache.export` wrote.

    vllm serve DECODER --kv-transfer-config '{"kv_connector": "KvweaveConnector", "kv_role": "kv_consumer",
        "kv_connector_module_path": "kvweave.serve.engines.vllm", "kv_connector_extra_config": {"root": CONTEXTS}}'

A request says which context it goes on from in `kv_transfer_params`, and repeats the digest as `cache_salt`
(`kvweave.serve.engines.handoff`); all others run as they would have. Only vLLM's public connector interface is used:
the context's keys and values come from outside, as those of a disaggregated prefill do. A request that is refused, or
whose context cannot be read, fails alone.
"""

import logging
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open

import vllm
from kvweave.serve.engines.handoff import ContextError, check_version, check_whole, context_of, heads_here, mark_of

check_version(vllm.__version__, vllm.__version_tuple__)  # before names that an older one may not have

from vllm.distributed import (  # noqa: E402
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)

_LOG = logging.getLogger("vllm.kvweave")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Load:
    """Slots that a request's blocks are to hold.

    Attributes:
        request: its id.
        path: the context's file; empty: the request is refused.
        skip: slots that its first blocks hold already; count: those behind them.
        blocks: all of its blocks.
    """

    request: str
    path: str
    skip: int
    count: int
    blocks: tuple[int, ...]


@dataclass
class Loads(KVConnectorMetadata):
    """What one step of the scheduler asks of its workers."""

    loads: list[Load] = field(default_factory=list)


class KvweaveConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module; made once for the scheduler and once for each worker.

    `kv_connector_extra_config`: `root`, the folder of all contexts, DIGEST.safetensors each; `model`, the mark of the
    model whose contexts are taken, where the decoder's folder does not say.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        settings = vllm_config.kv_transfer_config
        root = settings.get_from_extra_config("root", None)
        mark = settings.get_from_extra_config("model", None) or mark_of(vllm_config.model_config.model)
        if not root:
            raise ValueError('kv_connector_extra_config has no "root": allowed is the folder of all contexts')
        if not mark:
            raise ValueError(
                'nothing says whose contexts this model goes on from: allowed is a folder that "kvweave convert '
                '--decoder" wrote, or kv_connector_extra_config with "model"'
            )
        if settings.kv_load_failure_policy != "fail":
            raise ValueError(
                f"kv_load_failure_policy={settings.kv_load_failure_policy!r} is not allowed: it would run the tokens "
                'that stand for a context; allowed is "fail"'
            )
        if kv_cache_config is not None and len(kv_cache_config.kv_cache_groups) > 1:
            raise ValueError("the model has several kinds of attention: allowed is full attention in every layer")
        self._root, self._mark = str(root), str(mark)
        self._block = vllm_config.cache_config.block_size
        self._dtype = vllm_config.model_config.dtype
        self._paths: dict[str, str] = {}  # of the context that a request goes on from, until its blocks are known
        self._asked: list[Load] = []
        self._failed: set[int] = set()
        self._refused: set[str] = set()

    # ---------------------------------------------------------------- in the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Slots that come from outside behind those that the prefix cache has.

        A request that is refused is told that all of its tokens come later, and then that they did not: then none of
        them runs, whatever the prefix cache has.
        """
        try:
            context = context_of(
                request.kv_transfer_params, request.cache_salt, request.prompt_token_ids, self._root, self._mark
            )
            if context is not None and request.skip_reading_prefix_cache:
                raise ContextError("prompt_logprobs is not allowed with a context: its tokens never ran")
        except ContextError as why:
            _LOG.error("request %s is refused: %s", request.request_id, why)
            request.skip_reading_prefix_cache = False  # or vLLM would run the tokens
            self._paths[request.request_id] = ""
            return request.num_tokens - num_computed_tokens, True
        if context is None:
            return 0, False
        self._paths[request.request_id] = context.path
        return max(0, context.slots - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request's blocks are known."""
        path = self._paths.pop(request.request_id, None)
        if path is None or not num_external_tokens:
            return
        (ids,) = blocks.get_block_ids()
        covered = request.num_tokens if not path else int(request.kv_transfer_params["slots"])
        self._asked.append(
            Load(request.request_id, path, covered - num_external_tokens, num_external_tokens, tuple(ids))
        )

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """What the workers are to load in this step."""
        loads, self._asked = Loads(self._asked), []
        return loads

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Nothing is kept of it."""
        self._paths.pop(request.request_id, None)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Nothing is kept of it."""
        return self.request_finished(request, block_ids)

    # ---------------------------------------------------------------- in a worker

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write contexts into the blocks of the requests that go on from them, before the forward pass."""
        for load in self._get_connector_metadata().loads:
            if load.path:
                try:
                    self._fill(forward_context.no_compile_layers, load)
                    continue
                except Exception as error:  # whatever is wrong with one context, the engine goes on
                    _LOG.error("the context of request %s cannot be loaded: %s", load.request, _brief(error))
            else:
                self._refused.add(load.request)
            self._failed.update(load.blocks[load.skip // self._block :])

    def _fill(self, layers: Any, load: Load) -> None:
        check_whole(load.path)
        slots = torch.arange(load.skip, load.skip + load.count)
        places = torch.tensor(load.blocks)[slots // self._block] * self._block + slots % self._block
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        with safe_open(load.path, "pt") as file:
            for name, layer in layers.items():
                cache, number = getattr(layer, "kv_cache", None), _LAYER.search(name)
                if cache is None or number is None:
                    continue
                tensors = []
                for kind in "kv":
                    stored = file.get_slice(f"{kind}{number[1]}")
                    heads, count, _ = stored.get_shape()
                    if count != load.skip + load.count:
                        raise ContextError("slots of another number than the request's")
                    part = stored[heads_here(heads, rank, size), load.skip :]
                    tensors.append(part.transpose(0, 1).contiguous().to(cache.device, self._dtype))
                layer.impl.do_kv_cache_update(layer, *tensors, cache, places.to(cache.device))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that hold no context; vLLM fails the requests that have them."""
        failed, self._failed = self._failed, set()
        return failed

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Of refused requests nothing is to come any more."""
        refused, self._refused = self._refused, set()
        return None, refused or None

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All layers are loaded before the forward pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing goes out."""

    def wait_for_save(self) -> None:
        """Nothing goes out."""


def _brief(error: Exception) -> str:
    return str(error) if isinstance(error, ContextError) else type(error).__name__
