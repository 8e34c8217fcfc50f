"""Two processes that share each layer's heads give what one gives: what heads decide together goes over both."""

import os
import socket

import pytest
import torch
from tiny import assert_close, build, tiny_config, words
from torch import distributed as dist
from torch import multiprocessing
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.integrations import accelerate

import kvweave

#: Every method; those whose heads or layers share a budget with a steep allocation, and turns of unequal heads.
METHODS = {name: kvweave.get_method(name, budget=0.4) for name in kvweave.list_methods()} | {
    "flowmm by its ratio": kvweave.FlowMM(budget=0.4, proxies=4, theta=0.44),
    "in bytes": kvweave.SnapKV(budget="4KiB", window=4),
    "adakv, deferred": kvweave.get_method("adakv", budget=0.4, window=4, defer=2),
    "coarse, by layer": kvweave.Weave(0.3, form="lent", defer=2, recent=4, allocation="layer", coarse=1.5),
    "coarse, alike": kvweave.SnapKV(budget=0.3, window=4, defer=2, coarse=1.5),
    "meda, deferred": kvweave.get_method("meda", budget=0.4, defer=2),
}


def small():
    """Attention whose four heads differ, two a process."""
    return build(tiny_config("qwen2", tie_word_embeddings=False))


def conversation(model, method):
    """Logits of two turns of a padded batch and the reports of both."""
    ids, mask = words(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = 0
    visual = torch.zeros(2, 60, dtype=torch.bool)
    visual[:, 9:25] = True  # no placeholders: tokens that are alike would tie
    logits, reports, cache = [], [], None
    with kvweave.compress(model, method, visual=visual) as session:
        for _ in range(2):
            out = model.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=4,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            logits.append(torch.stack(out.logits, 1))
            reports.append(session.report)
            cache = session.cache
            ids = torch.cat([out.sequences, words(2, 7, seed=40)], 1)
            mask = torch.cat([mask, torch.ones(2, 11, dtype=torch.long)], 1)
    return torch.cat(logits, 1), reports


def _rank(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text()}
    torch.set_num_threads(1)
    accelerate.is_accelerate_available = lambda: True  # asked for where a plan is given, and not used with one
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    with torch.no_grad():
        done = {name: conversation(model.eval(), method) for name, method in METHODS.items()}
    torch.save(done, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What one process says, and each of two, of every method."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    model = small()
    model.save_pretrained(folder)
    multiprocessing.spawn(_rank, (folder,), nprocs=2)
    with torch.no_grad():
        alone = {name: conversation(model, method) for name, method in METHODS.items()}
    return alone, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_decode_and_report_what_one_does(told, name):
    alone, ranks = told
    logits, reports = alone[name]
    for rank in ranks:
        mine, said = rank[name]
        assert_close(mine, logits)
        for report, expected in zip(said, reports, strict=True):
            assert report["totals"] == expected["totals"]
            for layer, other in zip(report["layers"], expected["layers"], strict=True):
                assert_alike(layer, other)


def assert_alike(mine, theirs):
    """Counts and words are the same, ratios to float32's last digits."""
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        if key == "rows":
            for row, other in zip(mine[key], value, strict=True):
                assert_alike(row, other)
        elif isinstance(value, dict):
            assert_alike(mine[key], value)
        else:
            assert mine[key] == (pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value), key
