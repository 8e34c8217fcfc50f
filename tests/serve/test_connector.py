"""What vLLM's connector writes where: by stand-ins for the parts of vLLM that it uses, which is not installed here.

The real ones are in tests/vllm. Here are two tensor parallel processes, which a CPU of two cores has no room for.
"""

import importlib
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_export import SNAPKV, prefilled
from tiny import text_model

BLOCK = 4
BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
HERE = "kvweave.serve.engines.vllm"


class Base:
    """As much of KVConnectorBase_V1 as the connector uses."""

    def __init__(self, vllm_config, role, kv_cache_config):
        self.metadata = None

    def _get_connector_metadata(self):
        return self.metadata


class Paged:
    """One layer's blocks [blocks * block, kv_heads, dim] on one rank, written as an attention backend does."""

    def __init__(self, blocks, heads, dim):
        self.kv_cache = torch.zeros(blocks, 1)
        self.keys, self.values = (torch.zeros(blocks * BLOCK, heads, dim) for _ in range(2))
        self.impl = self

    def do_kv_cache_update(self, layer, keys, values, cache, places):
        assert layer is self
        assert cache is self.kv_cache
        self.keys[places], self.values[places] = keys, values


@pytest.fixture
def module(monkeypatch):
    """The connector's module over the stand-ins; `module.rank` is (rank, size)."""
    distributed, base = ModuleType("vllm.distributed"), ModuleType(BASE)
    base.KVConnectorBase_V1, base.KVConnectorMetadata = Base, object
    base.SupportsHMA = type("SupportsHMA", (), {})
    distributed.get_tensor_model_parallel_rank = lambda: loaded.rank[0]
    distributed.get_tensor_model_parallel_world_size = lambda: loaded.rank[1]
    vllm = ModuleType("vllm")
    vllm.__version__, vllm.__version_tuple__ = "0.28.0", (0, 28, 0)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    monkeypatch.setitem(sys.modules, BASE, base)
    monkeypatch.delitem(sys.modules, HERE, raising=False)
    loaded = importlib.import_module(HERE)
    loaded.rank = 0, 1
    yield loaded
    del sys.modules[HERE]


@pytest.fixture
def stored(tmp_path):
    model = text_model("llama")
    cache, _ = prefilled(model, SNAPKV)
    return tmp_path, cache.export(tmp_path, model)


def connector(module, stored, **other):
    folder, said = stored
    extra = {"root": str(folder), "model": said["model"]} | other.pop("extra", {})
    transfer = {
        "get_from_extra_config": lambda name, default: extra.get(name, default),
        "kv_load_failure_policy": "fail",
    }
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(**transfer | other),
        model_config=SimpleNamespace(model=str(folder), dtype=torch.float32),
        cache_config=SimpleNamespace(block_size=BLOCK),
    )
    return module.KvweaveConnector(config, None, None)


def scheduled(made, said, *, computed=0, blocks=(7, 2, 5, 0, 3, 8), **other):
    """A request goes through the scheduler's half; returns how many of its tokens come from outside, and how."""
    request = {
        "request_id": "1",
        "kv_transfer_params": {"context": said["digest"], "slots": said["slots"]},
        "cache_salt": said["digest"],
        "prompt_token_ids": [0] * said["slots"] + [9, 9],
        "num_tokens": said["slots"] + 2,
        "skip_reading_prefix_cache": False,
    }
    asked = SimpleNamespace(**request | other)
    external, later = made.get_num_new_matched_tokens(asked, computed)
    made.update_state_after_alloc(asked, SimpleNamespace(get_block_ids=lambda: (list(blocks),)), external)
    return external, later


def filled(made, heads=2):
    layers = {f"model.layers.{n}.self_attn.attn": Paged(9, heads, 8) for n in range(2)}
    made.metadata = made.build_connector_meta(None)
    made.start_load_kv(SimpleNamespace(no_compile_layers=layers | {"model.embed": object()}))
    return list(layers.values())


@pytest.mark.parametrize("computed", [0, BLOCK, 2 * BLOCK])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_process_holds_its_own_heads_in_the_requests_blocks(module, stored, size, computed):
    folder, said = stored
    slots, tensors = said["slots"], load_file(folder / f"{said['digest']}.safetensors")
    blocks = torch.tensor([7, 2, 5, 0, 3, 8])
    for rank in range(size):
        module.rank = rank, size
        made = connector(module, stored)
        assert scheduled(made, said, computed=computed) == (slots - computed, False)
        layers = filled(made, heads=max(1, 2 // size))
        own = slice(None) if size == 1 else slice(rank * 2 // size, rank * 2 // size + 1)
        at = torch.arange(computed, slots)
        places = blocks[at // BLOCK] * BLOCK + at % BLOCK
        for n, layer in enumerate(layers):
            assert torch.equal(layer.keys[places], tensors[f"k{n}"][own, computed:].transpose(0, 1))
            assert torch.equal(layer.values[places], tensors[f"v{n}"][own, computed:].transpose(0, 1))
            rest = torch.ones(len(layer.keys), dtype=torch.bool).index_fill(0, places, False)
            assert not layer.keys[rest].any()
        assert made.get_block_ids_with_load_errors() == set()
        assert made.get_finished(set()) == (None, None)


def test_what_a_worker_cannot_load_fails_alone(module, stored):
    folder, said = stored
    made = connector(module, stored)
    assert scheduled(made, said) == (said["slots"], False)
    (folder / f"{said['digest']}.safetensors").write_bytes(b"")
    layers = filled(made)
    assert made.get_block_ids_with_load_errors() == {7, 2, 5, 0, 3, 8}
    assert made.get_block_ids_with_load_errors() == set()
    assert not any(layer.keys.any() for layer in layers)


@pytest.mark.parametrize("computed", [0, BLOCK, 16])
def test_a_refused_request_runs_no_token(module, stored, computed):
    """Not even where the prefix cache has all that it asked for."""
    _, said = stored
    made = connector(module, stored)
    total = said["slots"] + 2
    assert scheduled(made, said, computed=computed, cache_salt="x") == (total - computed, True)
    filled(made)
    assert made.get_block_ids_with_load_errors() == set((7, 2, 5, 0, 3, 8)[computed // BLOCK :])
    assert made.get_finished(set()) == (None, {"1"})
    assert made.get_finished(set()) == (None, None)


def test_other_requests_are_left_alone(module, stored):
    made = connector(module, stored)
    assert scheduled(made, stored[1], kv_transfer_params=None) == (0, False)
    assert made.build_connector_meta(None).loads == []


def test_settings_are_refused_by_name(module, stored):
    for other, message in (
        ({"extra": {"root": None}}, 'kv_connector_extra_config has no "root"'),
        ({"extra": {"model": None}}, "nothing says whose contexts this model goes on from"),
        ({"kv_load_failure_policy": "recompute"}, "kv_load_failure_policy='recompute' is not allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            connector(module, stored, **other)


@pytest.mark.parametrize(
    ("version", "parts", "right"),
    [
        ("0.27.1", (0, 27, 1), False),
        ("0.9.2", (0, 9, 2), False),
        ("0.28.0rc1", (0, 28, 0, "rc1"), True),
        ("0.32.0", (0, 32, 0), True),
        ("1.0.0", (1, 0, 0), True),
        ("dev", (0, 0, "dev"), True),  # a checkout without tags
    ],
)
def test_a_vllm_that_is_too_old_is_refused_by_name(module, version, parts, right):
    sys.modules["vllm"].__version__, sys.modules["vllm"].__version_tuple__ = version, parts
    with (
        nullcontext()
        if right
        else pytest.raises(ImportError, match=f"vLLM {version} is not allowed: allowed is 0.28")
    ):
        importlib.reload(module)
