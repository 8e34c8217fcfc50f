"""A prompt that is said again before it is cut, and the end of a user's turn in a question's place (SPEC 15.5)."""

import contextlib
from dataclasses import dataclass, replace

import pytest
import torch
from test_deferred import HEARD, Listening, kept
from tiny import IMAGE, assert_close, decode, picture_inputs, text_inputs, text_model, vision_model, words
from transformers import PreTrainedTokenizerFast

import kvweave
from kvweave.methods.registry import parse_method
from kvweave.methods.weave import FORMS
from kvweave.seam.probes import INSTRUCTION, Probes, read_probes
from kvweave.seam.surprise import surprise

LISTENING = Listening(budget=0.3, window=4)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = "{{ bos_token }}[INST]{{ messages[0].content | trim }}[/INST]"
BARE = "{{ messages[0].content }}"


def tokenizer(template, eos="<|im_end|>"):
    """Words and the marks of the templates, a token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    marks = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
    known = {word: n for n, word in enumerate([*marks, *INSTRUCTION.replace(",", " ,").replace(".", " .").split()])}
    known |= {word: len(known) + n for n, word in enumerate(["user", "assistant", "kvweave"])}
    made = Tokenizer(models.WordLevel(known, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token=eos, unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": marks[2:]})
    fast.chat_template = template
    return fast


def heard_of(model, whole, length, layers=2):
    """What tokens behind the first `length` of `whole` attend to among those: sums over rows, means over heads."""
    with torch.no_grad():
        attentions = model(whole, output_attentions=True).attentions
    return [attentions[n][:, :, length:, :length].sum(2).unflatten(1, (2, -1)).mean(2) for n in range(layers)]


@pytest.mark.parametrize("chunk", [2048, 26, 11, 9])
def test_what_is_counted_is_what_the_prompt_attends_to_when_it_is_said_again(chunk):
    model, inputs = text_model(attention="eager"), text_inputs((26,), images=())
    ids = inputs["input_ids"]
    HEARD.clear()
    with kvweave.compress(model, LISTENING, probes="replay", replay_chunk=chunk) as session:
        decode(model, inputs, 2)
    sums, rows = [0.0, 0.0], 0
    for start in range(0, 26, chunk):
        said = ids[:, max(0, start - 8) : start + chunk]
        rows += said.shape[1]
        heard = heard_of(model, torch.cat([ids, said], 1), 26)
        sums = [a + b for a, b in zip(sums, heard, strict=True)]
    for layer in range(2):
        assert_close(HEARD[layer], sums[layer] / rows)
    told = session.report["probes"]
    assert (told["count"], told["tokens"], told["instructed"]) == (-(-26 // chunk), rows, False)
    assert session.cache.get_seq_length() == 27


def test_the_instruction_comes_before_each_chunk():
    model, inputs = text_model(attention="eager"), text_inputs((26,), images=())
    ids, processor = inputs["input_ids"], tokenizer(CHATML)
    HEARD.clear()
    with kvweave.compress(model, LISTENING, probes="replay", replay_chunk=20, processor=processor) as session:
        decode(model, inputs, 2)
    instruction = processor(f"{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    sums, rows = [0.0, 0.0], 0
    for part in (ids[:, :20], ids[:, 12:26]):
        whole = torch.cat([ids, torch.tensor([instruction]), part], 1)
        rows += whole.shape[1] - 26
        sums = [a + b for a, b in zip(sums, heard_of(model, whole, 26), strict=True)]
    for layer in range(2):
        assert_close(HEARD[layer], sums[layer] / rows)
    assert session.report["probes"]["instructed"]
    assert session.report["probes"]["count"] == 2  # no pictures, so nobody asks about them


def test_placeholders_of_images_are_left_out():
    model, inputs = vision_model(), picture_inputs((26,))
    fed = []
    with kvweave.compress(model, LISTENING, probes="replay") as session:
        model.register_forward_pre_hook(
            lambda part, args, kwargs: fed.append(kwargs["input_ids"].clone()), with_kwargs=True
        )
        decode(model, inputs, 1)
    ids = inputs["input_ids"]
    assert torch.equal(fed[1], ids[ids != IMAGE][None])
    assert session.report["probes"]["images"] is False


@dataclass(frozen=True)
class Looking(Listening):
    """The same that wants images said again."""

    @property
    def needs(self):
        return replace(super().needs, images=True)


LOOKING = Looking(budget=0.3, window=4)
SURPRISED = parse_method("weave:form=lent,surprise=8", budget=0.3)


def test_images_are_said_again_as_the_decoder_was_given_them():
    model, inputs, given = vision_model(attention="eager"), picture_inputs((26,)), []
    decoder = model.model.language_model
    noting = decoder.register_forward_pre_hook(lambda part, args, kwargs: given.append(kwargs), with_kwargs=True)
    HEARD.clear()
    with kvweave.compress(model, LOOKING, probes="replay") as session:
        decode(model, inputs, 1)
    noting.remove()
    first, again = given[0]["inputs_embeds"], given[1]["inputs_embeds"]
    assert torch.equal(first, again)
    assert not torch.equal(again, model.get_input_embeddings()(inputs["input_ids"]))
    before = given[0]["position_ids"][-3:]  # the first of four is the text's
    behind = before.amax() + torch.arange(1, 27).expand(3, 1, -1)
    with torch.no_grad():
        attentions = decoder(
            inputs_embeds=torch.cat([first, again], 1),
            position_ids=torch.cat([before, behind], -1),
            output_attentions=True,
        ).attentions
    for layer, whole in enumerate(attentions):
        assert_close(HEARD[layer], whole[:, :, 26:, :26].sum(2).unflatten(1, (2, -1)).mean(2) / 26)
    assert session.report["probes"]["tokens"] == 26
    assert session.cache.shared.turn.embeddings is None  # nobody needs them any more


@pytest.mark.parametrize("chunk", [2048, 11])
def test_a_row_with_images_is_said_again_as_alone(chunk):
    model, lengths = vision_model(), (30, 22)
    method = parse_method("kvzip:images=true", budget=0.3)
    with kvweave.compress(model, method, probes="replay", replay_chunk=chunk) as session:
        together, _ = decode(model, picture_inputs(lengths), 3)
    kept_together = kept(session.cache)
    assert session.report["probes"]["count"] == -(-30 // chunk)
    inputs = picture_inputs(lengths)
    for row, length in enumerate(lengths):
        part = {name: inputs[name][row : row + 1, -length:] for name in ("input_ids", "attention_mask")}
        part["mm_token_type_ids"] = inputs["mm_token_type_ids"][row : row + 1, -length:]
        part["pixel_values"] = inputs["pixel_values"][32 * row : 32 * (row + 1)]
        part["image_grid_thw"] = inputs["image_grid_thw"][2 * row : 2 * (row + 1)]
        with kvweave.compress(model, method, probes="replay", replay_chunk=chunk) as session:
            alone, _ = decode(model, part, 3)
        assert torch.equal(alone[0], together[row])
    assert kept_together


def test_where_nothing_told_of_images_the_text_alone_is_said_again():
    model, inputs, reports = vision_model(), picture_inputs((26,)), []
    for method in (LISTENING, LOOKING):
        cache = kvweave.CompressedCache(model.config, method, hold=True)
        with kvweave.attach(model), torch.no_grad():
            model(**inputs, past_key_values=cache)
            cache.shared.turn.embeddings = None
            cache.compress("replay")
        reports.append((kept(cache), cache.report["probes"]["images"], cache.report["probes"]["tokens"]))
    assert reports[0] == reports[1]
    assert reports[0][1] is False


def test_what_the_decoder_was_given_comes_in_pieces():
    model, inputs, sets = vision_model(), picture_inputs((26,)), []
    with torch.no_grad():
        embedded = []
        noting = model.model.language_model.register_forward_pre_hook(
            lambda part, args, kwargs: embedded.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(**inputs)
        noting.remove()
        visual = inputs["input_ids"] == IMAGE
        positions = torch.arange(26).expand(3, 1, -1)
        for ends in ((26,), (9, 26)):
            method = parse_method("kvzip:images=true", budget=0.3)
            with kvweave.compress(model, method, visual=visual):
                cache, start = kvweave.CompressedCache(model.config, method), 0
                cache.declare_prompt(26)
                for end in ends:
                    part = embedded[0][:, start:end]
                    model(inputs_embeds=part, position_ids=positions[..., start:end], past_key_values=cache)
                    start = end
            sets.append(kept(cache))
    assert sets[0] == sets[1]


def test_pictures_are_described_where_there_are_some():
    plain = {"answered": [[1]], "most": 3, "chunk": 64}
    counts = []
    for pictures in (0, 2):
        model, inputs = vision_model(), picture_inputs((26,), pictures=pictures)
        cache = kvweave.CompressedCache(model.config, LISTENING, hold=True)
        with kvweave.attach(model) as session, torch.no_grad():
            model(**inputs, past_key_values=cache)
            session.answer_probes(cache, Probes(**plain))
        counts.append(cache.report["probes"]["count"])
    assert counts == [1, 2]


@pytest.mark.parametrize("spelled", ["kvzip", "weave:proxies=4,recent=4", "quantized:method=kvzip"])
@pytest.mark.parametrize("chunk", [2048, 9])
def test_a_row_of_a_batch_is_said_again_as_alone(spelled, chunk):
    model, lengths = text_model(), (26, 14, 19)
    inputs = text_inputs(lengths)
    method = parse_method(spelled, budget=0.3)
    with kvweave.compress(model, method, probes="replay", replay_chunk=chunk) as session:
        together, _ = decode(model, inputs, 5)
    whole = session.cache
    for row, length in enumerate(lengths):
        part = {name: x[row : row + 1, -length:] for name, x in inputs.items()}
        with kvweave.compress(model, method, probes="replay", replay_chunk=chunk) as session:
            alone, _ = decode(model, part, 5)
        assert torch.equal(alone[0], together[row])
        for one, many in zip(session.cache.layers, whole.layers, strict=True):
            for mine, shared in zip(one.positions[0], many.positions[row], strict=True):
                assert torch.equal(mine[mine >= 0] + 26 - length, shared[shared >= 0])


@pytest.mark.parametrize("spelled", ["kvzip", "fold:method=kvzip,sinks=1", "quantized:method=kvzip"])
def test_kvzip_says_the_prompt_again_by_itself(spelled):
    model, inputs = text_model(), text_inputs((26, 19))
    method = parse_method(spelled, budget=0.3)
    sets = []
    for options in ({"probes": "replay"}, {}):
        with kvweave.compress(model, method, **options) as session:
            decode(model, inputs, 2)
        assert session.report["probes"]["count"] == 1
        sets.append(kept(session.cache))
    held = kvweave.CompressedCache(model.config, method, hold=True)
    given = kvweave.CompressedCache(model.config, method)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with kvweave.attach(model), torch.no_grad():
        for cache in (held, given):
            model(**inputs, position_ids=positions, past_key_values=cache)
        assert held.waits
        assert not given.waits
        held.compress()
    assert kept(held) == kept(given)
    assert sets[0] == sets[1]
    if spelled == "kvzip":
        assert session.report["rows"] == "probes"


@pytest.mark.parametrize("spelled", ["kvzip:replay=false", "kvzip:defer=2"])
def test_kvzip_goes_by_the_prompts_own_rows_where_it_is_told_to(spelled):
    model, inputs = text_model(), text_inputs((26,))
    with kvweave.compress(model, parse_method(spelled, budget=0.3)) as session:
        decode(model, inputs, 4)
    assert session.report["rows"] == "prompt"
    assert "probes" not in session.report


def test_a_later_turn_is_said_again_with_all_that_came_before():
    model, ids = text_model(), words(1, 40)
    cache = kvweave.CompressedCache(model.config, parse_method("kvzip", budget=0.3))
    told = []
    with kvweave.attach(model), torch.no_grad():
        for start, stop in ((0, 24), (24, 25), (25, 40)):
            model(input_ids=ids[:, start:stop], past_key_values=cache)
            told.append(cache.report["probes"]["tokens"])
    assert told == [24, 24, 40]


def test_beams_are_said_again_too():
    model, inputs = text_model(), text_inputs((26,))
    with kvweave.compress(model, parse_method("kvzip", budget=0.3)) as session:
        model.generate(**inputs, max_new_tokens=4, num_beams=2)
        assert session.report["rows"] == "probes"


def test_replay_needs_the_tokens():
    model, ids = text_model(), words(1, 26)
    embedded = model.get_input_embeddings()(ids)
    for method, probes in ((LISTENING, "replay"), (parse_method("kvzip", budget=0.3), None)):
        with (
            torch.no_grad(),
            kvweave.compress(model, method, probes=probes),
            pytest.raises(ValueError, match=r"token ids.*replay=false"),
        ):
            model(inputs_embeds=embedded, use_cache=True)


@pytest.mark.parametrize("value", [0, 2.5, True])
def test_chunks_that_are_not_allowed(value):
    with pytest.raises(ValueError, match=f"replay_chunk={value}"):
        kvweave.compress(text_model(), LISTENING, probes="replay", replay_chunk=value)


# -------------------------------------------------------------------- the end of a turn


@pytest.mark.parametrize(
    ("template", "eos", "end"),
    [
        (CHATML, "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n"),  # ends a turn by what ends a reply
        (CHATML, "<s>", "<|im_end|>\n<|im_start|>assistant\n"),
        (TRIMMED, "<s>", "[/INST]"),
    ],
)
def test_the_end_of_a_turn_is_found_and_read_whole(template, eos, end):
    model, inputs = text_model(attention="eager"), text_inputs((26,), images=())
    processor = tokenizer(template, eos)
    tokens = processor(end, add_special_tokens=False)["input_ids"]
    model.generation_config.eos_token_id = processor.eos_token_id
    assert read_probes("template", processor, 32).fed == [tokens]
    HEARD.clear()
    cache = kvweave.CompressedCache(model.config, LISTENING, hold=True)
    with kvweave.attach(model), torch.no_grad():
        model(**inputs, past_key_values=cache)
        cache.compress(probes="template", processor=processor)
    heard = heard_of(model, torch.cat([inputs["input_ids"], torch.tensor([tokens])], 1), 26)
    for layer in range(2):
        assert_close(HEARD[layer], heard[layer] / len(tokens))
    assert cache.report["probes"]["tokens"] == len(tokens)
    assert cache.get_seq_length() == 26


def test_templates_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="ends a user's turn with nothing"):
        read_probes("template", tokenizer(BARE), 32)
    for processor in (None, tokenizer(None)):
        with pytest.raises(ValueError, match="no chat template"):
            read_probes("template", processor, 32)


def whole(model, inputs, method=None, **options):
    """The cache of a prompt that was read by a `generate` of one token, and the session."""
    with kvweave.compress(model, method or kvweave.Weave(budget=0.3), **options) as session:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        yield session


@pytest.mark.parametrize("asking", ["freeze", "question"])
@pytest.mark.parametrize("pictures", [0, 2])
def test_weave_reads_a_context_again_when_it_is_asked_before_a_reply(asking, pictures):
    model, inputs = vision_model(), picture_inputs((26,), pictures=pictures)
    (named,) = whole(model, inputs, probes="replay")
    with contextlib.contextmanager(whole)(model, inputs) as session:
        cache = session.cache
        assert cache.waits
        if asking == "freeze":
            cache.freeze()
        else:
            with cache.question():
                pass
    assert kept(cache) == kept(named.cache)
    assert cache.report["probes"]["tokens"] == 26
    assert cache.report["works_as"] == named.report["works_as"]
    works = parse_method(cache.report["works_as"])
    assert (works.ahead, works.recent, works.sinks) == (0, 0, 0)
    assert not cache.shared.turn.on_request
    assert cache.shared.turn.embeddings is None


def test_rows_of_unlike_lengths_are_read_again_too():
    model, inputs = vision_model(), picture_inputs((30, 22))
    (named,) = whole(model, inputs, probes="replay")
    with contextlib.contextmanager(whole)(model, inputs) as session:
        session.cache.freeze()
    assert kept(session.cache) == kept(named.cache)


def test_weave_reads_nothing_again_once_a_reply_tells():
    model, inputs = text_model(), text_inputs((26,), images=())
    with kvweave.compress(model, budget=0.3) as session:
        decode(model, inputs, 4)
        assert session.cache.waits
        session.cache.freeze()
    assert not session.report.get("probes")
    assert session.report["deferred"] == 3


def test_weave_reads_nothing_again_without_a_model():
    model, inputs = text_model(), text_inputs((26,), images=())
    with contextlib.contextmanager(whole)(model, inputs) as session:
        pass
    session.cache.freeze()
    assert not session.report.get("probes")
    assert max(map(len, session.cache.layers[0].positions[0])) < 26


def test_a_second_prompt_waits_for_its_reply_again():
    model, inputs = text_model(), text_inputs((26,), images=())
    with contextlib.contextmanager(whole)(model, inputs) as session:
        cache = session.cache
        with cache.question():
            pass
        more = torch.cat([inputs["input_ids"], words(1, 12, seed=5)], 1)
        model.generate(input_ids=more, past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert cache.report["deferred"] == 8
    assert not cache.report.get("probes")
    assert parse_method(cache.report["works_as"]).ahead == FORMS["lent"]["ahead"]


@pytest.mark.parametrize("lengths", [(26,), (26, 15)])
def test_surprise_is_what_the_model_told_of_each_token(lengths):
    model, inputs = text_model(attention="eager"), text_inputs(lengths, images=())
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        out = model(**inputs, position_ids=(valid.cumsum(1) - 1).clamp(min=0), output_hidden_states=True)
    logs = out.logits.log_softmax(-1)
    nats = surprise(model, out.hidden_states[-1], inputs["input_ids"], valid)
    for row, length in enumerate(lengths):
        start = 26 - length
        assert not nats[row, : start + 1].any()
        for at in range(start + 1, 26):
            assert_close(nats[row, at], -logs[row, at - 1, inputs["input_ids"][row, at]])


def probed_scores(monkeypatch):
    """A list that takes what each layer's tokens are worth to weave once probes were asked."""
    plain, scores = kvweave.Weave.score, []

    def score(self, view, quota=None):
        own = plain(self, view, quota)
        if view.probed:
            scores.append(own.clone())
        return own

    monkeypatch.setattr(kvweave.Weave, "score", score)
    return scores


@pytest.mark.parametrize("instructed", [False, True])
def test_a_row_counts_by_the_surprise_of_what_it_leads_to(instructed, monkeypatch):
    model, inputs = text_model(attention="eager"), text_inputs((26,), images=())
    ids, processor = inputs["input_ids"], tokenizer(CHATML) if instructed else None
    scores = probed_scores(monkeypatch)
    with kvweave.compress(model, SURPRISED, processor=processor) as session:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        session.cache.freeze()
    monkeypatch.undo()
    before = processor(f"{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n")["input_ids"] if instructed else []
    with torch.no_grad():
        first = model(ids).logits.log_softmax(-1)
        weights = torch.zeros(27)
        weights[1:26] = -first[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        weights = (weights / 8).clamp(max=1)
        whole = torch.cat([ids, torch.tensor([before], dtype=torch.int64), ids], 1)
        attentions = model(whole, output_attentions=True).attentions
    leads = torch.cat([torch.zeros(max(0, len(before) - 1)), weights if before else weights[1:]])
    for layer, attention in enumerate(attentions):
        rows = attention[:, :, 26:, :26].unflatten(1, (2, -1)).amax(2) * leads[:, None]
        assert_close(scores[layer], rows.amax(2))


def test_an_image_counts_as_text_does_in_the_mean(monkeypatch):
    model, inputs, given = vision_model(attention="eager"), picture_inputs((26,)), []
    decoder = model.model.language_model
    with torch.no_grad():
        logs = model(**inputs).logits.log_softmax(-1)

    scores = probed_scores(monkeypatch)
    noting = decoder.register_forward_pre_hook(lambda part, args, kwargs: given.append(kwargs), with_kwargs=True)
    with contextlib.contextmanager(whole)(model, inputs, SURPRISED) as session:
        session.cache.freeze()
    noting.remove()
    ids = inputs["input_ids"]
    weights = torch.zeros(27)
    weights[1:26] = (-logs[0, :-1].gather(-1, ids[0, 1:, None])[:, 0] / 8).clamp(max=1)
    visual = ids[0] == IMAGE
    weights[:26][visual] = weights[:26][~visual].mean()
    positions = given[0]["position_ids"][-3:]
    behind = positions.amax() + torch.arange(1, 27).expand(3, 1, -1)
    with torch.no_grad():
        attentions = decoder(
            inputs_embeds=torch.cat([given[0]["inputs_embeds"], given[1]["inputs_embeds"]], 1),
            position_ids=torch.cat([positions, behind], -1),
            output_attentions=True,
        ).attentions
    for layer, attention in enumerate(attentions):
        rows = attention[:, :, 26:, :26].unflatten(1, (2, -1)).amax(2) * weights[1:, None]
        assert_close(scores[layer], rows.amax(2))


def test_a_context_that_is_read_again_goes_by_its_own_scores():
    """A profile is of what decoded tokens look at; equal counts stay."""
    lent = {"form": "lent", "budget": 0.3}
    for mix in (0.0, 0.5):
        asked = kvweave.Weave(**lent, allocation="profile", profile="smol-text", mix=mix).when_probed
        assert (asked.allocation, asked.profile) == ("global", None)
    assert kvweave.Weave(form="even", budget=0.3).when_probed.allocation == "head"
    assert kvweave.Weave(form="spelled", budget=0.3).when_probed == kvweave.Weave(form="spelled", budget=0.3)
    assert kvweave.Weave(**lent, defer=0).when_probed == kvweave.Weave(**lent, defer=0)


@pytest.mark.parametrize("pictures", [0, 2])
def test_on_a_context_weave_keeps_what_kvzip_would(pictures):
    model, inputs = vision_model(), picture_inputs((26,), pictures=pictures)
    (zipped,) = whole(model, inputs, parse_method("kvzip:sinks=0,floor=0.2,images=true", budget=0.3))
    with contextlib.contextmanager(whole)(model, inputs) as session:
        session.cache.freeze()
    assert kept(session.cache) == kept(zipped.cache)
