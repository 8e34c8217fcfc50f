"""What a method declares (`Method.needs`) is all that it asks for: nothing more is read once queries are released."""

from dataclasses import dataclass

import pytest
import torch

import kvweave
from kvweave import LayerView, Method, Plan
from kvweave.cut.layer_cut import LayerCut
from kvweave.cut.rows import compact, observe
from kvweave.cut.shares import by_row, share_out
from kvweave.cut.terms import Terms
from kvweave.memory.slots import Slots
from kvweave.methods.needs import ALL_ROWS, Needs
from kvweave.ops.statistics import AttentionRule
from strategies import WRAPPED, names_and_options, random_case, rotary_tables

LENGTH, BUDGET = 24, 9
METHODS = [item for item in [*names_and_options(), *WRAPPED] if item[0] != "full"]


def groups_of(method, queries, case, mask=None):
    """One layer as the method sees it, with as many queries as it declares."""
    terms = Terms.of(method, query_rows=method.needs.rows, rotary=rotary_tables(LENGTH, 8))
    prompt = kvweave.Prompt(case.visual, torch.ones_like(case.visual))
    slots = Slots(case.keys[0], case.values[0]).as_slots(prompt.valid, padded=False)
    own = queries if terms.query_rows else None
    return LayerCut(0).groups(slots, own, prompt, AttentionRule(8**-0.5), terms, mask)


@pytest.mark.parametrize(("name", "options"), METHODS, ids=str)
def test_a_cut_that_comes_later_reads_what_was_computed_before(name, options):
    method = kvweave.get_method(name, budget=BUDGET, **options)
    case = random_case([n % 3 == 1 for n in range(LENGTH)], layers=1)
    at_once, later = (groups_of(method, case.queries[0], case) for _ in range(2))
    weights = observe(method, later, [BUDGET], [LENGTH])
    assert later[0].view.queries is None
    observed = [by_row(later, weights)] if method.layer_adaptive else None
    share = share_out(method, [BUDGET], [LENGTH], 1, observed)[0]
    kept = [compact(method, groups, share, [BUDGET]).compacted for groups in (at_once, later)]
    assert torch.equal(kept[0].positions, kept[1].positions)
    assert torch.equal(kept[0].values, kept[1].values)


@pytest.mark.parametrize("form", ["lent", "even", "lent,coarse=2", "lent,temperature=none"])
@pytest.mark.parametrize("masked", [False, True])
def test_what_a_cut_that_waits_holds_of_the_last_rows_says_as_much_as_they_did(form, masked):
    """Nothing was decoded: the prompt's own rows count, whose queries were released."""
    method = kvweave.parse_method(f"weave:form={form},budget={BUDGET},proxies=5,recent=1,sinks=1")
    case = random_case([False] * LENGTH, layers=1)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril() if masked else None
    if mask is not None:
        mask[..., 3] = False
        mask[..., LENGTH - 2, 7] = False
    at_once, later = (groups_of(method, case.queries[0], case, mask) for _ in range(2))
    weights = observe(method, at_once, [BUDGET], [LENGTH])
    assert observe(method, later, [BUDGET], [LENGTH], later=True) == ([0.0] if method.pools else weights)
    assert later[0].view.queries is None
    if method.pools:
        weights = [method.observe(later[0].view)]
    share = share_out(method, [BUDGET], [LENGTH], 1, [weights] if method.layer_adaptive else None)[0]
    kept = [compact(method, groups, share, [BUDGET]).compacted for groups in (at_once, later)]
    assert torch.equal(kept[0].positions, kept[1].positions)


def test_attention_of_a_reply_is_reduced_as_its_plan_asks_and_no_further():
    lent, spelled = (kvweave.parse_method(f"weave:form={form}").needs for form in ("lent", "spelled"))
    assert lent.reductions(probed=False) == (("max", "max"),)
    assert lent.reductions(probed=True) == (("max", "max"), ("mean", "max"))
    assert spelled.reductions(probed=False) == spelled.reductions(probed=True) == (("mean", "mean"),)


def test_a_statistic_that_was_not_declared_is_refused_by_name():
    @dataclass(frozen=True)
    class Undeclared(Method):
        name = "undeclared"
        needs = Needs(ALL_ROWS)

        def plan(self, view: LayerView, budget: int) -> Plan:
            return Plan(view.column_mass().topk(budget).indices.sort().values)

    method, case = Undeclared(budget=BUDGET), random_case([False] * LENGTH, layers=1)
    groups = groups_of(method, case.queries[0], case)
    observe(method, groups, [BUDGET], [LENGTH])
    with pytest.raises(RuntimeError, match=r"Needs\.statistics"):
        compact(method, groups, [BUDGET], [BUDGET])


@pytest.mark.parametrize("member", ["query_rows", "turns_keys", "keeps_rows", "decoded_reductions"])
def test_members_that_needs_took_the_place_of_are_refused_by_name(member):
    with pytest.raises(TypeError, match=f"Old.{member} is read no more: allowed is needs"):
        type("Old", (Method,), {member: 3})


def test_a_wrapper_needs_what_the_method_inside_needs_and_its_own():
    inside = kvweave.get_method("weave", defer=2, rope_aware=True)
    needs = kvweave.Regress(method=inside, rows=64).needs
    assert (needs.rows, needs.rows_with_probes, needs.rotary) == (64, ALL_ROWS, True)
    assert needs.decoded == inside.needs.decoded
    assert needs.decoded_queries
