"""Does FlowMM's cross-modal flow tell which heads deserve more of the budget?

    python -m benchmarks.research.flow_budgets --albums 12 --count 6

smol reads albums; each KV head's flow (SPEC 3, step 1, of its own query heads) is held against the share of a prompt
that the head wants, as the profile that is shipped for smol has it. Then weave goes by a profile made of flow, by one
made of its reverse, by the shipped one and by equal counts. Needs `kvweave lab fetch smol`.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from kvweave import models
from kvweave.evals.calibration.prompts import prompts_of
from kvweave.methods.allocation import Profile
from kvweave.methods.needs import ALL_ROWS, Needs
from kvweave.methods.snapkv import SnapKV
from kvweave.models.chat import encode
from kvweave.plan import Plan
from kvweave.seam.entry import compress
from kvweave.view import LayerView

BUDGETS = (0.2, 0.1, 0.05)
_BY_PROFILE = "weave:form=lent,allocation=profile,mix=0,profile={}"


@dataclass(frozen=True)
class Crossing(SnapKV):
    """Notes each KV head's flow, by layer.

    Attributes:
        found: [kv_heads] for each layer of each prompt.
    """

    found: list[Tensor] = field(default_factory=list, compare=False)

    @property
    def needs(self) -> Needs:
        return Needs(rows=ALL_ROWS)

    def plan(self, view: LayerView, budget: int) -> Plan:
        from_text, from_visual = view.column_sums()[0].unbind(1)  # [heads, length] each
        visual = view.visual[0].repeat_interleave(len(from_text) // view.kv_heads, 0)
        crossing = (from_text * visual + from_visual * ~visual).sum(-1) / view.length
        self.found.append(crossing.view(view.kv_heads, -1).mean(-1))
        return super().plan(view, budget)


@torch.inference_mode()
def flows(model: Any, processor: Any, albums: int) -> Tensor:
    """Flow of each head: [albums, layers, kv_heads]."""
    found = []
    for prompt in prompts_of("smol", processor, albums, None):
        method = Crossing(budget=0.2)
        with compress(model, method):
            model(**encode(processor, prompt.messages), use_cache=True, logits_to_keep=1)
        found.append(torch.stack(method.found))
    return torch.stack(found).double()


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, of two flat tensors without ties to speak of."""
    ranks = torch.stack([x.flatten().argsort().argsort().double() for x in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def shares(wanted: Tensor, budget: float) -> Tensor:
    """Shares in proportion to what is wanted, none above 1, with the mean `budget`: as `wanted`."""
    low, high = torch.zeros(()).double(), 1 / wanted.clamp(min=1e-9).min()
    for _ in range(60):  # the factor at which the mean is met, by halving
        middle = (low + high) / 2
        low, high = (middle, high) if (wanted * middle).clamp(max=1).mean() < budget else (low, middle)
    return (wanted * high).clamp(max=1)


def write_profile(wanted: Tensor, like: Profile, path: Path) -> None:
    tables = tuple(tuple(map(tuple, shares(wanted, budget).tolist())) for budget in like.budgets)
    Profile(like.fingerprint, like.budgets, tables).write(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--albums", type=int, default=12)
    parser.add_argument("--count", type=int, default=6, help="samples a family")
    parser.add_argument("--seed", type=int, default=9601, help="of these")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("out/flow-budgets"), help="folder")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    model, processor = models.load("smol", dtype=given.dtype)
    found = flows(model, processor, given.albums)
    mean, shipped = found.mean(0), Profile.read("smol")
    rows = []
    for budget in BUDGETS:
        wanted = torch.tensor(shipped.at(budget))
        by_album = sorted(rank_correlation(one, wanted) for one in found)
        by_layer = rank_correlation(mean.mean(-1), wanted.mean(-1))
        rows.append([
            f"{budget:.0%}", f"{rank_correlation(mean, wanted):+.2f}", f"{by_album[0]:+.2f} to {by_album[-1]:+.2f}",
            f"{by_layer:+.2f}",
        ])  # fmt: skip
    table = measure.markdown_table(["kept", "heads, mean flow", "heads, single albums", "layers"], rows)
    paths = {name: given.out / f"{name}.json" for name in ("flow", "reverse")}
    write_profile(mean, shipped, paths["flow"])
    write_profile(mean.max() + mean.min() - mean, shipped, paths["reverse"])
    methods = [_BY_PROFILE.format(profile) for profile in ("smol", *paths.values())]
    command = [
        "eval", "--model", "smol", "--dtype", given.dtype, "--count", f"{given.count}", "--batch", f"{given.count}",
        "--seeds", f"{given.seed}", "--budgets", ",".join(map(str, BUDGETS)), "--no-fidelity", "--pictures", "0",
        "--quiet", "--methods", ",".join(f"{method}" for method in [*methods, "weave:form=even"]),
        "--out", f"{given.out / 'eval'}",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "kvweave", *command], check=True)
    text = (
        "# Budgets by cross-modal flow\n\nRank correlation of a head's flow with the share of a prompt that it wants "
        f"(the profile of smol), {given.albums} albums:\n\n{table}\n"
        "What weave keeps of albums by a profile made of flow, of its reverse, by the shipped one, and by equal "
        f"counts:\n\n{(given.out / 'eval' / 'table.md').read_text().partition(chr(10))[2].strip()}\n"
    )
    print(text)
    measure.write("flow-budgets", measure.machine(), {"flow": mean.tolist(), "rows": rows}, text, given.out)


if __name__ == "__main__":
    main()
