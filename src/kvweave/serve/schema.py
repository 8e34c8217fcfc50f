"""What a request may hold, field by field. What is not named here is refused, never ignored."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvweave.serve.errors import Refusal

Kind = TypeVar("Kind", bound=BaseModel)
_MISSING = "missing"
_WORDS = {"extra_forbidden": "is not known here", _MISSING: "is missing"}


def _whole(text: str) -> str:
    """JSON can spell half of a character, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is not allowed") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class TextPart(_Part):
    type: Literal["text"]
    text: Text


class ImageUrl(_Part):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageUrl


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ContentPart]
    name: str | None = None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content, piece by piece."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else list(self.content)


class Compression(_Part):
    """kvweave's own part of a request: `extra_body={"kvweave": {...}}` of the openai client.

    Attributes:
        method: one of those that are offered.
        budget: what stays of the prompt: a share in (0, 1], or tokens from 2 on; JSON's 1 is the whole.
    """

    method: str | None = None
    budget: (
        Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | Annotated[int, Field(ge=2, lt=2**31)] | None
    ) = None


class ReplyOptions(Compression):
    """The same of a chat request.

    Attributes:
        context: the id of a context that the messages are a question about.
        trace: tell which tokens of the prompt are kept.
        ignore_eos: the model's own end of a reply does not end it, to measure with.
        return_token_ids: tell the tokens of replies beside their text.
        known_token_ids: the first tokens of each reply, one that was cut off elsewhere: it is decoded on behind them.
    """

    context: Annotated[str, Field(max_length=64)] | None = None
    trace: bool = False
    ignore_eos: bool = False
    return_token_ids: bool = False
    known_token_ids: list[list[Annotated[int, Field(ge=0)]]] = Field(default=[], max_length=128)

    @model_validator(mode="after")
    def _one_source(self) -> "ReplyOptions":
        if self.context is not None and (self.method is not None or self.budget is not None):
            raise ValueError("method and budget are not allowed beside context, which was compressed before")
        if self.context is not None and self.trace:
            raise ValueError("trace is not allowed beside context, which was compressed before")
        return self


class Own(_Part):
    """What a gateway reads of a chat request."""

    kvweave: ReplyOptions | None = None


class StreamOptions(_Part):
    include_usage: bool = False


class Plain(_Part):
    type: Literal["text"]


class ChatRequest(_Part):
    """`POST /v1/chat/completions`. Fields below `user` are taken at the value that changes nothing."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    kvweave: ReplyOptions = ReplyOptions()
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: Plain | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """OpenAI's clients may send null for what is not set."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    @property
    def stops(self) -> list[str]:
        """Texts that end a reply; empty ones would end it before it begins."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in found if stop]

    @property
    def most(self) -> int | None:
        """Tokens of a reply at most."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class ContextRequest(_Part):
    """`POST /v1/contexts`: what is read once, to be asked about."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    kvweave: Compression = Compression()


def parsed(kind: type[Kind], data: dict[str, Any]) -> Kind:
    """The request that JSON holds.

    Raises:
        Refusal: it names the first field that is at fault.
    """
    for outside in ("kv_transfer_params", "cache_salt"):  # an engine's own business
        if outside in data:
            raise Refusal(400, f"{outside} is not taken from outside", outside)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        worst = max(errors, key=lambda one: len(one["loc"]))  # of the kinds that a field may have, the one it is
        field = _path(data, worst["loc"], worst["type"] == _MISSING)
        said = _WORDS.get(worst["type"], worst["msg"].removeprefix("Value error, "))
        raise Refusal(400, f"{field or 'the request'}: {said}", field or None) from None


def _path(data: Any, places: tuple[int | str, ...], missing: bool) -> str:
    """Where an error is, as a user would write it: pydantic names the kinds that it tried as well."""
    found, here = [], data
    for number, place in enumerate(places):
        known = place in here if isinstance(here, dict) else isinstance(here, list) and isinstance(place, int)
        if known or (missing and number == len(places) - 1):
            found.append(str(place))
            here = here[place] if known else None
    return ".".join(found)
