"""docs/GENERATION.md: what becomes of every way that transformers generates in, with a compressed cache.

    PYTHONPATH=tests/seam python -m benchmarks.generation > docs/GENERATION.md

Each way runs on a tiny model with random weights, under a method that evicts and one that merges, and is held
against the tests' oracle: the plain model, generating in the same way, whose attention over the full cache in float64
sees what the compressed cache holds. `equal`: the same tokens, logits to 1e-5.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny  # the tests' models and oracle
import torch
import transformers
from torch import Tensor, distributed, multiprocessing
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompileConfig,
    GenerationConfig,
    QuantizedCache,
    StaticCache,
)
from transformers.distributed import DistributedConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import kvweave
from kvweave.methods import Method
from kvweave.methods.merging import MergingMethod
from kvweave.seam.names import CACHE

PROMPT, STEPS = 36, 6
METHODS: dict[str, Method] = {
    "snapkv": kvweave.SnapKV(budget=0.3, window=4),
    "flowmm": kvweave.FlowMM(budget=0.3, proxies=4),
}
EQUAL = "equal"


class DiffersError(AssertionError):
    """A run with the compressed cache and one with the masked full cache say different things."""


@dataclass(frozen=True)
class Way:
    """One way to generate.

    Attributes:
        name: what it is called; spelling: how it is asked for.
        run: raises where the method's run is refused, or differs from the oracle's.
        note: what there is to know beside.
    """

    name: str
    spelling: str
    run: Callable[[Method], None]
    note: str = ""


# -------------------------------------------------------------------- running, and holding one run against another


def model_of(**special: Any) -> Any:
    return tiny.text_model("llava", **special)


def prompts(rows: int = 2) -> dict[str, Tensor]:
    """Prompts that repeat themselves, so that there is something to look up; with more rows than one, left-padded."""
    inputs = tiny.text_inputs((PROMPT, PROMPT - 9)[:rows], images=((4, 12),))
    if rows == 1:
        inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :24], inputs["input_ids"][:, 12:24]], 1)
    return inputs


def said(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and logits of each step or scores of each beam."""
    torch.manual_seed(4)
    settings = {
        "max_new_tokens": STEPS,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
    }
    out = model.generate(**inputs, **settings | options)
    scores = out.sequences_scores if "num_beams" in options else torch.stack(out.logits, 1)
    return out.sequences, scores


def hold(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Raise where they are not equal."""
    if not torch.equal(mine[0], theirs[0]):
        raise DiffersError("tokens")
    if (mine[1] - theirs[1]).abs().max() > 1e-5 * max(1.0, float(theirs[1].abs().max())):
        raise DiffersError("logits")


def cut(session: kvweave.Session) -> tiny.Cut:
    """What the oracle may see: the prompt's slots as the cache holds them."""
    totals = session.report["totals"]
    if not totals["layers"] or totals["kept"] >= totals["length"]:
        raise DiffersError("nothing was compressed")
    if isinstance(session.cache.method, MergingMethod) and not totals["merged"]:
        raise DiffersError("nothing was merged")
    return tiny.cut_of(session.cache, PROMPT, merged=True)


def plainly(rows: int = 2, *, same: tuple[str, ...] = (), **options: Any) -> Callable[[Method], None]:
    """A way that is a setting of `generate`.

    Args:
        same: settings that the oracle goes without: they shall not change what is said.
    """

    def run(method: Method) -> None:
        model, inputs = model_of(), prompts(rows)
        with kvweave.compress(model, method) as session:
            mine = said(model, inputs, **options)
        with tiny.masked(model, cut(session)):
            theirs = said(model, inputs, **{name: x for name, x in options.items() if name not in same})
        hold(mine, theirs)

    return run


# -------------------------------------------------------------------- ways of their own


def assisted(method: Method) -> None:
    plainly(1, assistant_model=tiny.text_model(seed=1), same=("assistant_model",))(method)


def embeddings(method: Method) -> None:
    model, inputs = model_of(), prompts()
    embeds = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }
    with kvweave.compress(model, method, visual=inputs["input_ids"] == tiny.IMAGE) as session:
        mine = said(model, embeds)
    with tiny.masked(model, cut(session)):
        hold(mine, said(model, embeds))


def guided(method: Method) -> None:
    """Two conversations side by side, each with a cut of its own: held against the two, run apart."""
    model, inputs, negative = tiny.text_model(), tiny.words(1, PROMPT), tiny.words(1, 11, seed=8)
    scale, caches = 1.5, []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: caches.append(kwargs[CACHE]), with_kwargs=True
    )
    with kvweave.compress(model, method):
        tokens = model.generate(inputs, max_new_tokens=STEPS, guidance_scale=scale, negative_prompt_ids=negative)
    hook.remove()
    own, other = {id(cache): cache for cache in caches}.values()
    for step in range(STEPS):
        logits = []
        for prompt, cache in ((inputs, own), (negative, other)):
            ids, end = torch.cat([prompt, tokens[:, PROMPT : PROMPT + step]], 1), prompt.shape[1]
            with torch.no_grad(), tiny.masked(model, *[tiny.cut_of(cache, end, merged=True)] * bool(step)):
                logits.append(model(input_ids=ids).logits[:, -1].log_softmax(-1))
        chosen = (scale * (logits[0] - logits[1]) + logits[1]).argmax(-1)
        if int(chosen) != int(tokens[0, PROMPT + step]):
            raise DiffersError(f"token {step}")


def turns(method: Method) -> None:
    """A second prompt on the same cache compresses the whole again."""
    model, inputs = model_of(), prompts(1)
    cache = kvweave.CompressedCache(model.config, method)
    with kvweave.attach(model):
        first = model.generate(**inputs, max_new_tokens=STEPS, past_key_values=cache)
        once = tiny.cut_of(cache, PROMPT, merged=True)
        ids = torch.cat([first, tiny.words(1, 9, seed=9)], 1)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        mine = said(model, whole | {"past_key_values": cache})
        again = tiny.cut_of(cache, ids.shape[1], merged=True)
    with tiny.masked(model, once, again):
        hold(mine, said(model, whole))


def question(method: Method) -> None:
    model, inputs = model_of(), prompts()
    cache, ids = kvweave.CompressedCache(model.config, method), tiny.words(2, 5, seed=9)
    with kvweave.attach(model), torch.no_grad():
        model(**inputs, past_key_values=cache)
        with cache.question(ids) as asked:
            mine = said(model, asked)
        before = tiny.cut_of(cache, PROMPT, merged=True)
    with tiny.masked(model, before):
        hold(mine, said(model, {name: asked[name] for name in ("input_ids", "attention_mask")}))


def saved(method: Method) -> None:
    model, inputs = model_of(), prompts()
    cache, ids = kvweave.CompressedCache(model.config, method), tiny.words(2, 5, seed=9)
    with kvweave.attach(model), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        model(**inputs, past_key_values=cache)
        cache.save(Path(folder) / "cache", model)
        loaded = kvweave.CompressedCache.load(Path(folder) / "cache", model)
        both = []
        for each in (loaded, cache):
            with each.question(ids) as asked:
                both.append(said(model, asked))
    hold(both[0], both[1])


def piped(method: Method) -> None:
    """`transformers.pipeline` reads texts, so that a tokenizer is needed: one word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(tiny.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0")
    model, ids = tiny.text_model(), tiny.words(1, PROMPT)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = " ".join(f"w{n}" for n in ids[0].tolist())
    with kvweave.compress(model, method) as session:
        out = pipe(text, max_new_tokens=STEPS, return_full_text=False)[0]["generated_text"]
    mine = torch.tensor([int(word[1:]) for word in out.split()])
    with tiny.masked(model, cut(session)):
        theirs = model.generate(ids, max_new_tokens=STEPS)[0, PROMPT:]
    if not torch.equal(mine, theirs):
        raise DiffersError("tokens")


def own_loop(method: Method) -> None:
    model, inputs = tiny.text_model(), tiny.words(1, PROMPT)
    tokens, logits = [], []
    with torch.no_grad(), kvweave.compress(model, method) as session:
        out = model(input_ids=inputs)
        for _ in range(STEPS):
            logits.append(out.logits[:, -1])
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            out = model(input_ids=tokens[-1], **{CACHE: session.cache})
    with tiny.masked(model, cut(session)):
        theirs = said(model, {"input_ids": inputs})
    hold((torch.cat([inputs, *tokens], 1), torch.stack(logits, 1)), theirs)


def named(implementation: str) -> Callable[[Method], None]:
    return plainly(cache_implementation=implementation)


def own_cache(make: Callable[[Any], Any]) -> Callable[[Method], None]:
    """A cache of transformers' own that is passed in."""

    def run(method: Method) -> None:
        model = model_of()
        with kvweave.compress(model, method):
            said(model, prompts() | {"past_key_values": make(model.config)})
        raise DiffersError("it was accepted")

    return run


def emptied(method: Method) -> None:
    model, inputs, cache = model_of(), prompts(), transformers.DynamicCache()
    with kvweave.compress(model, method) as session:
        mine = said(model, inputs | {"past_key_values": cache})
    if session.cache is not cache:
        raise DiffersError("another cache was filled")
    with tiny.masked(model, cut(session)):
        hold(mine, said(model, inputs))


def static(config: Any) -> Any:
    return StaticCache(config=config, max_cache_len=64)


def packed(config: Any) -> Any:
    cache = object.__new__(QuantizedCache)  # without a package that quantises
    transformers.Cache.__init__(cache, layers=list(transformers.DynamicCache(config=config).layers))
    return cache


def continuous(method: Method) -> None:
    model, ids = tiny.text_model(), tiny.words(2, PROMPT).tolist()
    settings = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    with kvweave.compress(model, method):
        model.generate_batch(
            ids, GenerationConfig(max_new_tokens=STEPS), continuous_batching_config=settings, warmup=False
        )
    raise DiffersError("it was accepted")


def attentions(method: Method) -> None:
    model = tiny.text_model(attention="eager")
    with kvweave.compress(model, method) as session:
        out = model.generate(
            tiny.words(1, PROMPT), max_new_tokens=STEPS, output_attentions=True, return_dict_in_generate=True
        )
    cut(session)
    width, slots = out.attentions[-1][0].shape[-1], session.cache.layers[0].keys.shape[2]
    raise DiffersError(f"attention weights are of {width} slots" if width == slots else f"{width} columns")


# -------------------------------------------------------------------- weights that lie elsewhere, or in few bits


def offloaded_weights(method: Method) -> None:
    """The decoder's layers on disk, brought in by accelerate's hooks at each forward pass."""
    model, inputs = model_of(), prompts()
    room = int(0.8 * sum(weight.nbytes for weight in model.parameters()))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        other = loaded(model, folder, device_map="auto", max_memory={"cpu": room}, offload_folder=f"{folder}/offload")
        if other.model.language_model.layers[0].self_attn.q_proj.weight.device.type != "meta":
            raise DiffersError("nothing was offloaded")
        with kvweave.compress(other, method) as session:
            mine = said(other, inputs)
        with tiny.masked(model, cut(session)):
            hold(mine, said(model, inputs))


def four_bits(method: Method) -> None:
    """Linear layers of NF4, computed by bitsandbytes on the CPU."""
    import bitsandbytes  # noqa: F401  transformers says at length that it is missing

    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    model, inputs = model_of(**sizes, text_config=sizes), prompts()
    setting = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        four = loaded(model, folder, device_map="cpu", dtype=torch.float32, quantization_config=setting)
    if four.model.language_model.layers[0].self_attn.q_proj.weight.dtype != torch.uint8:
        raise DiffersError("no weights are packed")
    with kvweave.compress(four, method) as session:
        mine = said(four, inputs)
    with tiny.masked(four, cut(session)):
        hold(mine, said(four, inputs))


def loaded(model: Any, folder: str, **how: Any) -> Any:
    """What was saved of `model`, loaded in this way."""
    other = type(model).from_pretrained(folder, attn_implementation="sdpa", **how).eval()
    other.generation_config = model.generation_config
    return other


def parallel(method: Method) -> None:
    """Two processes, each with half of every layer's heads, say what one says."""
    model = tiny.build(tiny.tiny_config("qwen2", tie_word_embeddings=False))
    inputs = prompts()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        torch.save((method.to_dict(), inputs), f"{folder}/inputs")
        multiprocessing.spawn(_rank, (folder,), nprocs=2)
        both = [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]
    with kvweave.compress(model, method) as session:
        alone = said(model, inputs)
    with tiny.masked(model, cut(session)):
        hold(alone, said(model, inputs))
    for mine in both:
        hold(mine, alone)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    settings, inputs = torch.load(f"{folder}/inputs")
    with kvweave.compress(model.eval(), kvweave.method_from_dict(settings)):
        torch.save(said(model, inputs), f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


# -------------------------------------------------------------------- the page

WAYS = [
    Way("greedy", "`generate(**inputs)`", plainly(), "a left-padded batch of two"),
    Way("sampling", "`do_sample=True`", plainly(do_sample=True, temperature=2.0)),
    Way(
        "several sequences",
        "`do_sample=True, num_return_sequences=3`",
        plainly(do_sample=True, temperature=2.0, num_return_sequences=3),
    ),
    Way("beams", "`num_beams=3`", plainly(num_beams=3, num_return_sequences=2)),
    Way("beam sampling", "`num_beams=3, do_sample=True`", plainly(num_beams=3, do_sample=True, temperature=2.0)),
    Way(
        "assisted",
        "`assistant_model=small`",
        assisted,
        "what greedy decoding says; drafts wait until the prompt has been cut",
    ),
    Way(
        "prompt look-up",
        "`prompt_lookup_num_tokens=3`",
        plainly(1, prompt_lookup_num_tokens=3, same=("prompt_lookup_num_tokens",)),
        "as assisted",
    ),
    Way("chunked prefill", "`prefill_chunk_size=7`", plainly(prefill_chunk_size=7), "what one piece gives"),
    Way(
        "compiled steps",
        "`compile_config=CompileConfig()`",
        plainly(compile_config=CompileConfig(backend="eager", dynamic=True), same=("compile_config",)),
        "room is laid out once the prompt has been cut",
    ),
    Way("guidance", "`guidance_scale=1.5, negative_prompt_ids=ids`", guided, "each prompt is cut at its own end"),
    Way("embeddings", "`inputs_embeds=x`", embeddings, "`compress(..., visual=mask)` says which are visual"),
    Way("turns", "`past_key_values=cache`", turns, "a prompt compresses the whole again"),
    Way("one of many questions", "`with cache.question(ids) as inputs:`", question, "the cache is then as it was"),
    Way("a saved context", "`CompressedCache.load(path, model)`", saved, "against the cache that was saved"),
    Way("a loop by hand", "`model(input_ids=ids, past_key_values=session.cache)`", own_loop),
    Way("pipelines", "`transformers.pipeline(task, model=model)`", piped, "called inside `compress`"),
    Way("tensor parallel", '`tp_plan="auto"`', parallel, "two processes, gloo"),
    Way("weights on disk", '`device_map="auto"`', offloaded_weights, "accelerate's hooks; the cache stays in memory"),
    Way("weights of 4 bits", "`BitsAndBytesConfig(load_in_4bit=True)`", four_bits, "NF4, in the oracle too"),
    Way("a cache by name", '`cache_implementation="dynamic"`', named("dynamic")),
    Way("", '`cache_implementation="static"`', named("static")),
    Way("", '`cache_implementation="offloaded_static"`', named("offloaded_static")),
    Way("", '`cache_implementation="offloaded"`', named("offloaded")),
    Way("", '`cache_implementation="quantized"`', named("quantized")),
    Way("", '`cache_implementation="paged"`', named("paged")),
    Way("a cache of transformers'", "`past_key_values=DynamicCache()`", emptied, "it is made over in place"),
    Way("", "`past_key_values=StaticCache(...)`", own_cache(static)),
    Way("", "`past_key_values=QuantizedCache(...)`", own_cache(packed), "`kvweave.Quantized(method)` packs"),
    Way("continuous batching", "`generate_batch(prompts)`", continuous),
    Way("attention weights", "`output_attentions=True`", attentions, "by nature: over slots, not over tokens"),
]


def outcome(way: Way, method: Method) -> str:
    """What became of it, in words."""
    try:
        way.run(method)
    except DiffersError as error:
        return f"differs: {error}"
    except ModuleNotFoundError as error:
        return f"not run: {error.name} is not installed"
    except (ValueError, TypeError, RuntimeError) as error:
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        ours = where is not None and "/kvweave/" in where.tb_frame.f_code.co_filename
        return f"{'refused' if ours else 'fails in transformers'}: {' '.join(str(error).split())}"
    return EQUAL


def row(way: Way, found: list[str]) -> str:
    """Its line in the table."""
    cells = [text.replace("|", "/") for text in found]
    if len(set(cells)) == 1 and cells[0] != EQUAL:
        cells = [cells[0], *["the same"] * (len(cells) - 1)]
    return f"| {way.name} | {way.spelling} | {' | '.join(cells)} | {way.note} |"


def page(found: dict[str, list[str]]) -> str:
    """docs/GENERATION.md, of what became of each way under each method."""
    lines = [
        "# Ways to generate",
        "",
        f"Written by `make generation`, with transformers {transformers.__version__}, torch "
        f"{torch.__version__.partition('+')[0]} and tiny models with random weights, on a CPU. Methods: "
        f"{', '.join(f'`{method.spelling()}`' for method in METHODS.values())}: one evicts, one merges.",
        "",
        "`equal`: the same tokens as the plain model that generates in the same way, with an attention over its full "
        "cache, in float64, that sees what the compressed cache holds; logits or beams' scores to 1e-5. `refused`: "
        "the sentence is the error's.",
        "",
        f"| way | asked for by | {' | '.join(METHODS)} | beside |",
        f"|---|---|{'---|' * len(METHODS)}---|",
    ]
    lines += [row(way, found[way.spelling]) for way in WAYS]
    return "\n".join([*lines, "", *BY_READING])


BY_READING = [
    "What a CPU cannot run, or transformers no longer holds:",
    "",
    '- **Flash attention** (`attn_implementation="flash_attention_2"`): methods that evict are equal to the masked '
    "full cache, padded batches and turns too, by transformers' own path with the package's two functions computed "
    "on the CPU (`tests/seam/test_flash.py`). Methods that add to logits (`mass_bias=True`), `compile_config` and "
    "`reserve` are refused by name.",
    "- **AWQ, GPTQ**, by reading: their packages put modules of their own in the place of linear layers, as "
    "bitsandbytes does; queries and keys are taken behind them, where attention is called, and are no integers. One "
    "wrapper looks at a weight: `critical` takes values' own norms where an output projection is packed, and reports "
    "so (`projected`).",
    "- **Contrastive search, DoLa, group and constrained beams**: code of the hub's since transformers 5, which "
    "`generate` downloads where it may (`trust_remote_code`). Not run here.",
    "- **Encoder-decoders, flex attention**: refused by name when kvweave is attached.",
    "",
]


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found: dict[str, list[str]] = {}
    wanted = sys.argv[1:]
    for way in WAYS:
        if not wanted or any(part in f"{way.name} {way.spelling}" for part in wanted):
            found[way.spelling] = [outcome(way, method) for method in METHODS.values()]
            print(f"{way.name} {way.spelling}: {found[way.spelling]}", file=sys.stderr, flush=True)
    if not wanted:
        print(page(found))


if __name__ == "__main__":
    main()
