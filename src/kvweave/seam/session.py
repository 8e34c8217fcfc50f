"""The seam with transformers' forward pass and `generate`: a model, and what it must know to fill a compressed cache.

Its attention is replaced by a twin that reads compressed layers (`kvweave.seam.attention`); a hook before each
forward pass puts the cache in place and notes which of the new columns are visual and which padding; `generate` is
wrapped, on the instance, because a forward pass cannot tell where a prompt ends. All of it is undone on leaving,
also by an exception.
"""

import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kvweave.methods.base import Method
from kvweave.prompt import Prompt, visual_mask, visual_token_ids
from kvweave.seam.asides import answer_probes, read_probes, rewindable
from kvweave.seam.attention import PREFIX, interleaved, twin
from kvweave.seam.cache import CompressedCache
from kvweave.seam.layer import CompressedLayer


class Session:
    """A model to which kvweave is attached; a context manager. See `compress` and `attach`.

    Attributes:
        cache: the last compressed cache that the model filled, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method | None,
        *,
        visual: Tensor | None = None,
        trace: bool = False,
        probes: list[list[int]] | None = None,
        probe_tokens: int = 32,
    ) -> None:
        self.model = model
        self.method = method
        self.trace = trace
        self.cache: CompressedCache | None = None
        self._visual = visual
        self._probes, self._probe_tokens = probes, probe_tokens
        self._warned = False  # said once that nothing is compressed
        self._base = ""  # the attention that the model came with
        self._running = threading.local()  # generate and forward calls may nest, and run in several threads
        self._undo: list[Callable[[], None]] = []

    # ------------------------------------------------------------ attaching and detaching

    def attach(self) -> "Session":
        """Let the model's attention read compressed caches.

        Raises:
            RuntimeError: kvweave is attached to this model already.
            ValueError: a model that kvweave cannot compress; the message says why.
        """
        model = self.model
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model={type(model).__name__} is not a transformers model")
        if model.config.is_encoder_decoder:
            raise ValueError(f"model={type(model).__name__} is an encoder-decoder: kvweave compresses decoders only")
        decoder = model.config.get_text_config(decoder=True)
        base = decoder._attn_implementation
        if base.startswith(PREFIX):
            raise RuntimeError(f"kvweave is already attached to this {type(model).__name__}; sessions do not nest")
        if base == "flex_attention":
            raise ValueError("attn_implementation='flex_attention' is not supported: allowed is sdpa, eager or flash")
        self._base = base
        if self.method is not None:
            _check_bias(self.method, base)
        name = twin(base)
        parts = model.config.sub_configs
        key = next((k for k in parts if getattr(model.config, k, None) is decoder), "")

        def choose(implementation: str) -> None:
            model.set_attn_implementation({key: implementation})  # "": the model itself, its towers keep theirs

        self._undo.append(lambda: choose(base))
        try:
            choose(name)
            if decoder._attn_implementation != name:
                raise ValueError(
                    f"model={type(model).__name__} does not let its attention be chosen: kvweave cannot read its keys"
                )
            # Some models hand the whole generation to an inner one (BLIP-2): their own forward never runs.
            for part in model.modules():
                if part is model or (isinstance(part, PreTrainedModel) and part.can_generate()):
                    self._hook(part)
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Leave the model as it was found."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "Session":
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _hook(self, part: PreTrainedModel) -> None:
        before = part.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._undo.append(before.remove)
        after = part.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True)
        self._undo.append(after.remove)
        if part is self.model and (self.method is None or self.method.turns_keys):
            for module in part.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    noted = module.register_forward_pre_hook(self._before_attention, with_kwargs=True)
                    self._undo.append(noted.remove)
        if not hasattr(part, "generate"):
            return
        own = part.__dict__.get("generate")
        part.generate = self._knowing_the_prompt(part.generate)
        self._undo.append(lambda: part.__dict__.pop("generate") if own is None else setattr(part, "generate", own))

    @property
    def report(self) -> dict[str, Any]:
        """What the last compression did, JSON-able: see `CompressedCache.report`. Empty before any."""
        return self.cache.report if self.cache is not None else {}

    # ------------------------------------------------------------ what happens while the model runs

    def _knowing_the_prompt(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate`, with its input's length at hand: a forward pass cannot tell a prompt's last piece."""

        @functools.wraps(generate)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            running = self._running
            outer = {name: getattr(running, name, None) for name in ("end", "visual", "own", "stops")}
            running.end, running.own = _input_length(args, kwargs), None
            settings = kwargs.get("generation_config")
            running.stops = kwargs.get("eos_token_id", getattr(settings, "eos_token_id", None))
            running.inside = []
            planned = self._with_room(kwargs, running.end) if outer["end"] is None else None
            if planned is not None:
                kwargs["past_key_values"] = planned
            ids = _input_ids(args, kwargs)
            if ids is not None:
                running.visual = visual_mask(self.model.config, ids, kwargs)
            try:
                if planned is None:
                    return generate(*args, **kwargs)
                with self._compiling_from_the_cut(planned):
                    return generate(*args, **kwargs)
            finally:
                vars(running).update(outer)
                if planned is not None:
                    planned.conversation.room = None
                    planned.settle()

        return wrapped

    @contextmanager
    def _compiling_from_the_cut(self, cache: CompressedCache) -> Iterator[None]:
        """Decode steps that come before a deferred cut run as they are: memory has no fixed place yet."""
        model: Any = self.model
        get = model.get_compiled_call

        def get_compiled_call(config: Any) -> Callable[..., Any]:
            compiled = get(config)
            return lambda *args, **kwargs: (compiled if cache.fixed else model)(*args, **kwargs)

        model.get_compiled_call = get_compiled_call
        try:
            yield
        finally:
            del model.get_compiled_call

    def _with_room(self, kwargs: dict[str, Any], length: int | None) -> CompressedCache | None:
        """The cache of a `generate` whose decode steps are to be compiled, room asked for; None: they are not."""
        config = kwargs.get("generation_config") or self.model.generation_config

        def asked(name: str) -> Any:
            return kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)

        plain = (asked("num_beams") or 1) == 1 and not any(
            asked(name)
            for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size", "disable_compile")
        )
        given = kwargs.get("past_key_values")
        cache = CompressedCache(self.model.config, self.method, trace=self.trace) if self.method else None
        cache = cache if given is None else given
        if asked("compile_config") is None or not plain or asked("use_cache") is False:
            return None
        if length is None or not isinstance(cache, CompressedCache):
            return None
        if "flash" in self._base:
            raise ValueError("compile_config is not allowed with flash attention: allowed is sdpa or eager")
        if cache.method.redecode:
            raise ValueError("compile_config is not allowed with redecode=True: allowed is one of them")
        tokens = asked("max_new_tokens")
        if tokens is None:
            tokens = max(1, (asked("max_length") or 0) - length)
        cache.conversation.room = int(tokens)
        return cache

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running = self._running
        inside = vars(running).setdefault("inside", [])
        if model in inside:  # it was left by an exception, without a word
            del inside[inside.index(model) :]
        inside.append(model)
        if len(inside) > 1:
            return None  # the outer model's hook knows more: ids, token types
        if args:
            kwargs = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        ids = kwargs.get("input_ids")
        inputs = ids if ids is not None else kwargs.get("inputs_embeds")
        cache = self._cache_for(model, kwargs)
        if inputs is None or cache is None:
            return None
        kwargs["past_key_values"] = cache
        self.cache = running.cache = cache  # the last one of all threads, and this thread's
        if cache.fixed:
            if inputs.shape[1] == 1:
                cache.conversation.attached = True
                return (), kwargs
            cache.settle()
        if not any(isinstance(layer, CompressedLayer) for layer in cache.layers):
            return (), kwargs  # no full attention at all: `_after_forward` says so
        talk = cache.conversation
        mask = kwargs.get("attention_mask")
        talk.sees_all = getattr(running, "end", None) is not None and (
            mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        )
        cache.cut_if_due()  # candidates of assisted decoding have been taken back by now
        seen, new = cache.get_seq_length(), inputs.shape[1]
        end = self._prompt_end(cache, seen, new)
        if self._probes and (end is not None and seen < end):
            talk.held = True
        if talk.held and end is not None and seen < end:
            talk.last_position = _last_position(kwargs.get("position_ids"))
        cache.session = weakref.ref(self)
        redecodes = talk.method.redecode and not talk.held and cache.waits
        if redecodes and (end is None or seen >= end) and not self._drafting:
            self._redecode(model, cache, kwargs)
            self.cache = running.cache = cache
        talk.attached = True
        talk.prompt = self._prompt(cache, ids, inputs, kwargs, seen, seen + new if end is None else end)
        if not talk.frozen and end is not None:
            talk.end = end
            if seen < end:
                talk.counted = None
        if talk.declared is not None and seen + new >= talk.declared:
            talk.declared = None
        if talk.awaited and talk.end is not None:
            self._count(cache, ids, seen, new)
        return (), kwargs

    def _redecode(self, model: nn.Module, cache: CompressedCache, kwargs: dict[str, Any]) -> None:
        """With `redecode`: draft the tokens that the cut waits for, make it, and take them back.

        It happens inside the forward pass of the first decoded token, so that `generate` goes on as if nothing had
        been: sampling, streamers, beams and processors of logits see no draft. The draft itself is greedy.
        """
        running = self._running
        missing = cache.method.defer - cache.decoded
        step = _first_token(kwargs)
        inside, running.inside, running.drafting = running.inside, [], True
        try:
            with torch.no_grad(), rewindable(cache):
                for _ in range(missing):
                    step = _next_token(step, model(**step).logits[:, -1:].argmax(-1))
                cache.crop(-missing)
        finally:
            running.inside, running.drafting = inside, False

    def answer_probes(self, cache: CompressedCache, probes: Any, processor: Any, tokens: int) -> None:
        """For `CompressedCache.compress`: ask the model, and cut the cache by what it looked at."""
        if not self._undo:
            raise ValueError("probes: the model is not attached any more: allowed is after kvweave.attach(model)")
        asked = read_probes(probes, processor, tokens)
        if cache.waits:
            self._answer(self.model, cache, asked, tokens)

    def _answer(self, model: nn.Module, cache: CompressedCache, probes: list[list[int]], tokens: int = 0) -> None:
        if cache.decoded:
            raise ValueError(
                "probes are not allowed with assisted decoding: allowed is generate without an assistant"
            )
        self._running.drafting = True
        try:
            answer_probes(model, cache, probes, tokens or self._probe_tokens)
        finally:
            self._running.drafting = False

    @property
    def _drafting(self) -> bool:
        return getattr(self._running, "drafting", False)

    def _count(self, cache: CompressedCache, ids: Tensor | None, seen: int, new: int) -> None:
        """Tell the cache which of a forward pass's columns are decoded tokens of replies that have not ended."""
        end, prompt = cache.conversation.end, cache.prompt
        first = max(seen, end or 0)
        if prompt is None or first >= min(seen + new, (end or 0) + cache.conversation.awaited):
            return
        live = prompt.valid[:, first : seen + new]
        ended = torch.zeros_like(live)
        if ids is not None:
            stops = torch.tensor(self._stops(), device=ids.device)
            ended = torch.isin(ids[:, first - seen :], stops).to(live.device)
        cache.count_decoded(first - (end or 0), live, ended)

    def _stops(self) -> list[int]:
        """Tokens that end a reply, as `generate` was told or the model's settings say."""
        stops = getattr(self._running, "stops", None)
        if stops is None:
            stops = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        if stops is None:
            return []
        return [int(stop) for stop in stops] if isinstance(stops, (list, tuple, Tensor)) else [int(stops)]

    def _prompt_end(self, cache: CompressedCache, seen: int, new: int) -> int | None:
        """Logical length at which the prompt ends that this forward pass belongs to; None: it decodes."""
        running = self._running
        if self._drafting:
            return None
        if getattr(running, "end", None) is not None:  # inside `generate`
            if running.own is None:
                running.own = cache  # of all conversations that it may run, the one it was given
            if running.own is cache:
                return running.end
        if cache.conversation.declared is not None:
            return cache.conversation.declared
        return seen + new if new > 1 or seen == 0 else None

    def _before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the rotary tables, for methods that turn keys."""
        cache, tables = getattr(self._running, "cache", None), kwargs.get("position_embeddings")
        if cache is None or not cache.conversation.turns_keys or not isinstance(tables, tuple):
            return
        layer = cache.layers[module.layer_idx] if module.layer_idx < len(cache.layers) else None  # type: ignore
        if not isinstance(layer, CompressedLayer) or layer.index or not getattr(module, "is_causal", True):
            return  # all compressed layers are turned by the same tables; a vision tower has its own
        cos, sin = (_one_axis(table, self.model.config.get_text_config(decoder=True)) for table in tables)
        cache.conversation.append_rotary(cos, sin, layer.seen, interleaved=interleaved(module))

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        inside = vars(self._running).get("inside", [])
        if not inside or inside[-1] is not model:
            return  # a hook that raised before ours: the forward pass never began
        inside.pop()
        if not inside:
            self._running.cache = None
        cache = kwargs.get("past_key_values")
        if inside or not isinstance(cache, CompressedCache):
            return
        cache.conversation.attached = False
        if out is None or cache.fixed:
            return  # the forward pass raised, or changed tensors alone
        for layer in cache.layers:
            if isinstance(layer, CompressedLayer) and layer.unread:
                layer.unread = False
                layer.kind = "keys are transformed after the cache"
        cache.finish_prompt()
        if _new_tokens(kwargs) == 1:
            cache.cut_if_due()
        if self._probes and cache.waits and cache.decoded >= 0 and not self._drafting:
            self._answer(model, cache, self._probes)
        if not cache.compressed_layers and not self._warned:
            self._warned = True
            kinds = sorted({layer["kind"] for layer in cache.report["layers"]})
            warnings.warn(
                f"kvweave compressed no layer of {type(self.model).__name__}: {'; '.join(kinds)}",
                stacklevel=2,
            )

    def _cache_for(self, model: nn.Module, kwargs: dict[str, Any]) -> CompressedCache | None:
        """The compressed cache that this forward pass fills; None if it should run as it is."""
        given = kwargs.get("past_key_values")
        if isinstance(given, CompressedCache):
            _check_bias(given.method, self._base)
            return given
        if self.method is None:
            return None
        uses_cache = kwargs.get("use_cache")
        if uses_cache is None:
            uses_cache = getattr(self.model.config.get_text_config(decoder=True), "use_cache", True)
        if not uses_cache:
            return None
        if given is not None:
            if type(given) is not DynamicCache or getattr(given, "offloading", False):
                kind = "offloaded " if getattr(given, "offloading", False) else ""
                raise ValueError(
                    f"past_key_values={kind}{type(given).__name__} cannot be compressed: allowed is none, an empty "
                    "DynamicCache or a kvweave.CompressedCache"
                )
            if given.get_seq_length():
                raise ValueError(
                    f"past_key_values=DynamicCache already holds {given.get_seq_length()} tokens that were not "
                    "compressed: allowed is none, an empty DynamicCache or a kvweave.CompressedCache"
                )
        config = model.config if isinstance(model, PreTrainedModel) else self.model.config
        return CompressedCache(config, self.method, trace=self.trace)

    def _prompt(
        self, cache: CompressedCache, ids: Tensor | None, inputs: Tensor, kwargs: dict[str, Any], seen: int, end: int
    ) -> Prompt:
        """What is known of all columns once this forward pass has appended its own."""
        batch, new = inputs.shape[:2]
        prompt = cache.prompt
        visual = self._visual_columns(cache.method, ids, inputs, kwargs, seen, min(end, seen + new))
        mask = kwargs.get("attention_mask")
        valid = torch.ones(batch, new, dtype=torch.bool, device=inputs.device)
        if cache.is_compileable:  # transformers has made the mask already
            mask = _columns_seen(mask)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            valid = mask[:, -new:].bool().to(inputs.device)
            inside = new == 1 and getattr(self._running, "end", None) is not None  # it says nothing new of the others
            if seen and prompt is not None and mask.shape[1] >= seen + new and not inside:
                mask = mask.bool().to(inputs.device)
                prompt = Prompt(prompt.visual[:, :seen], mask[:, :seen])
        if not seen or prompt is None:
            return Prompt(visual, valid)
        return prompt.cropped(seen).to(inputs.device).extended(visual, valid)

    def _visual_columns(
        self, method: Method, ids: Tensor | None, inputs: Tensor, kwargs: dict[str, Any], seen: int, end: int
    ) -> Tensor:
        """Modalities of this forward pass's columns: as the user said, else from what the model was given."""
        batch, new = inputs.shape[:2]
        if self._visual is not None and self._visual.shape[1] < end:
            raise ValueError(
                f"visual has {self._visual.shape[1]} columns, and the prompt has {end}: allowed is as many"
            )
        known = self._visual[:, seen : seen + new] if self._visual is not None else None
        if known is None:
            known = visual_mask(self.model.config, ids, kwargs)
        if known is None and getattr(self._running, "visual", None) is not None:  # what the outer generate was given
            known = self._running.visual[:, seen : seen + new]
        if known is None:
            if method.uses_modality and visual_token_ids(self.model.config) and not seen:
                warnings.warn(
                    f"{method.name} goes by modality, and embeddings alone do not tell which tokens are visual: "
                    "all count as text unless kvweave.compress(..., visual=mask) says otherwise",
                    stacklevel=2,
                )
            return torch.zeros(batch, new, dtype=torch.bool, device=inputs.device)
        known = known.to(inputs.device)
        if known.shape[0] != batch:  # beams and samples repeat the rows that generate was given
            if batch % known.shape[0]:
                raise ValueError(f"visual has {known.shape[0]} rows, which does not fit a batch of {batch}")
            known = known.repeat_interleave(batch // known.shape[0], 0)
        missing = known.new_zeros(batch, max(0, new - known.shape[1]))  # decoded tokens behind the prompt: text
        return torch.cat([known, missing], 1)[:, -new:]


def _columns_seen(mask: Any) -> Any:
    """What the last row of a whole mask sees, bool [batch, columns]; other masks as they are."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return mask
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last >= 0


def _first_token(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a forward pass, of its first token alone."""
    step = {"past_key_values": kwargs["past_key_values"], "use_cache": True, "return_dict": True}
    mask = kwargs.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError("redecode=True is not allowed with an attention mask of one's own: allowed is a 2-D one")
        step["attention_mask"] = mask[:, : mask.shape[1] - _new_tokens(kwargs) + 1]
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            step[name] = kwargs[name][:, :1]
    for name in ("position_ids", "token_type_ids", "mm_token_type_ids"):
        if kwargs.get(name) is not None:
            step[name] = kwargs[name][..., :1]
    return step


def _last_position(position_ids: Any) -> Tensor | None:
    """Position ids [..., batch, 1] of the last of [..., batch, new]; of several axes, before the next text."""
    if not isinstance(position_ids, Tensor):
        return None
    last = position_ids.amax(-1, keepdim=True)
    if last.dim() == 3:  # height, width and time of an image may end elsewhere
        last = torch.cat([last[:-3], last[-3:].amax(0, keepdim=True).expand_as(last[-3:])])
    return last


def _next_token(step: dict[str, Any], token: Tensor) -> dict[str, Any]:
    """The inputs of the forward pass after `step`, of the tokens [batch, 1]."""
    following = {name: value for name, value in step.items() if name != "inputs_embeds"} | {"input_ids": token}
    if "attention_mask" in step:
        mask = step["attention_mask"]
        following["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    if "position_ids" in step:
        following["position_ids"] = step["position_ids"] + 1
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in step:
            following[name] = torch.zeros_like(step[name])
    return following


def _new_tokens(kwargs: dict[str, Any]) -> int:
    """Columns of a forward pass."""
    ids = kwargs.get("input_ids")
    return (ids if ids is not None else kwargs["inputs_embeds"]).shape[1]


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    return ids if isinstance(ids, Tensor) and ids.dim() == 2 else None


def _input_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Columns of the prompt that `generate` was given, those already cached included."""
    given = [_input_ids(args, kwargs), kwargs.get("inputs_embeds")]
    lengths = [x.shape[1] for x in given if isinstance(x, Tensor)]
    mask = kwargs.get("attention_mask")
    if lengths and isinstance(mask, Tensor) and mask.dim() == 2:
        lengths.append(mask.shape[1])
    return max(lengths, default=None)


def _check_bias(method: Method, implementation: str) -> None:
    """Flash attention takes no bias on its logits."""
    if method.biases_logits and "flash" in implementation:
        raise ValueError("mass_bias=True is not allowed with flash attention: allowed is sdpa or eager")


def _one_axis(table: Tensor, config: Any) -> Tensor:
    """Rotary tables of several axes, [axes, batch, columns, dim], as attention combines them (older transformers)."""
    if table.dim() != 4:
        return table
    rope = getattr(config, "rope_parameters", None) or config.rope_scaling
    parts = table.split([2 * n for n in rope["mrope_section"]], -1)
    return torch.cat([part[axis % len(table)] for axis, part in enumerate(parts)], -1)


# -------------------------------------------------------------------- what users call


def compress(
    model: PreTrainedModel,
    method: Method,
    *,
    visual: Tensor | None = None,
    trace: bool = False,
    probes: Any = None,
    processor: Any = None,
    probe_tokens: int = 32,
) -> Session:
    """Compress the KV cache of everything that `model` is given inside the `with` block.

        with kvweave.compress(model, kvweave.FlowMM(budget=0.2)) as session:
            out = model.generate(**inputs, max_new_tokens=64)
        session.report

    Args:
        model: any decoder of transformers, with an image encoder or without.
        method: what decides which entries stay.
        visual: bool [batch, length], which tokens are visual, where only embeddings are passed; else it is read
            from the inputs.
        trace: keep what became of each token, for pictures.
        probes: for contexts whose question is not known: what the model is asked about a prompt before it is cut;
            what it then looks at stays (SPEC 13.2). A list of texts or of token ids, or "default". They take the
            place of `defer`, which is ignored. A method that reads no attention is none the wiser.
        processor: the model's, or its tokenizer, where probes are texts.
        probe_tokens: most tokens of an answer to a probe.
    Raises:
        TypeError: `method` is none, `model` is none.
        ValueError, RuntimeError: on entering, where the model cannot be compressed or already is.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method={method!r} is not a kvweave method: allowed is one of kvweave.get_method(...)")
    if visual is not None and (visual.dtype != torch.bool or visual.dim() != 2):
        raise ValueError(f"visual must be bool [batch, length], got {visual.dtype} {list(visual.shape)}")
    asked = None if probes is None else read_probes(probes, processor, probe_tokens)
    return Session(model, method, visual=visual, trace=trace, probes=asked, probe_tokens=probe_tokens)


def attach(model: PreTrainedModel) -> Session:
    """Let `model` read every `CompressedCache` that it is given, until `detach()` is called on the result.

    cache = kvweave.CompressedCache(model.config, method)
    handle = kvweave.attach(model)
    out = model.generate(**inputs, past_key_values=cache)
    handle.detach()
    """
    return Session(model, None).attach()
