"""What one `generate` was asked for."""

from typing import Any

from torch import Tensor

from kvweave.seam.names import CACHE, listed, without_cache


class Request:
    """The facts of one `generate`.

    Attributes:
        kwargs: its keyword arguments, but the cache.
        cache: the cache that was given, or None.
        ids: the prompt's int64 [batch, length], or None.
        length: columns of the prompt, those already cached included; None: nothing tells.
        stops: tokens that end a reply.
    """

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.cache, self.kwargs = without_cache(kwargs)
        self._settings = self.kwargs.get("generation_config") or getattr(model, "generation_config", None)
        ids = self.kwargs.get("input_ids", self.kwargs.get("inputs", args[0] if args else None))
        self.ids: Tensor | None = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None
        lengths = [x.shape[1] for x in (self.ids, self.kwargs.get("inputs_embeds")) if isinstance(x, Tensor)]
        mask = self.kwargs.get("attention_mask")
        if lengths and isinstance(mask, Tensor) and mask.dim() == 2:
            lengths.append(mask.shape[1])
        self.length: int | None = max(lengths, default=None)
        self.stops = self._stops(model)

    def setting(self, name: str) -> Any:
        """A setting of generation, as the call or else the configuration says."""
        value = self.kwargs.get(name)
        return getattr(self._settings, name, None) if value is None else value

    def new_tokens(self) -> int:
        """Most tokens that it may decode."""
        most = self.setting("max_new_tokens")
        return int(most) if most is not None else max(1, (self.setting("max_length") or 0) - (self.length or 0))

    def arguments(self) -> dict[str, Any]:
        """The keywords of `generate`."""
        return self.kwargs | ({} if self.cache is None else {CACHE: self.cache})

    def _stops(self, model: Any) -> list[int]:
        stops = self.setting("eos_token_id")
        if stops is None:
            stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        return listed(stops)
