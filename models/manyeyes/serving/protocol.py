"""What OpenAI's chat completions look like, as far as a bundle has them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from manyeyes.errors import ManyEyesError, RecordError
from manyeyes.runtime.bundle import Bundle
from manyeyes.runtime.engine import AnswerPiece, Chat, TokenChance, place_images
from manyeyes.runtime.sampling import MOST_TOP_LOGPROBS, Sampling
from manyeyes.serving.images import ImageLimits, collect_images

DEFAULT_TOKENS = 256
_MOST_STOPS = 4


class _ImageUrl(BaseModel):
    url: str


class _ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: _ImageUrl


class _TextPart(BaseModel):
    type: Literal["text"]
    text: str


_Part = Annotated[_TextPart | _ImagePart, Field(discriminator="type")]


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    @property
    def text(self) -> str:
        parts = (
            [self.content]
            if isinstance(self.content, str)
            else [part.text for part in self.content if isinstance(part, _TextPart)]
        )
        return "\n".join(parts)

    @property
    def images(self) -> list[str]:
        parts = [] if isinstance(self.content, str) else self.content
        return [part.image_url.url for part in parts if isinstance(part, _ImagePart)]


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _TextFormat(BaseModel):
    type: Literal["text"] = "text"


class ChatRequest(BaseModel):
    """The body of ``POST /v1/chat/completions``; other fields than these change nothing.

    What would change the answer and is not supported is refused by its value.
    """

    model: str
    messages: list[_Message] = Field(min_length=1)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: _TextFormat | None = None

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; greedily where nothing is said."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > _MOST_STOPS:
            raise RecordError(f"stop has {len(stop)} texts", f"at most {_MOST_STOPS} are taken", "Leave some out.")
        return Sampling(
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(stop),
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class RequestError(Exception):
    """An answer of the server that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_request_error(error: ManyEyesError) -> RequestError:
    """What a client is told of one of our errors: its own fault, or the server's."""
    from manyeyes.errors import RecipeError

    return RequestError(400 if isinstance(error, RecordError | RecipeError) else 500, str(error))


def read_request(body: bytes) -> ChatRequest:
    """Check a body.

    Raises:
        RequestError: It is no JSON, or a field is missing, wrong or not supported; names the first.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise RequestError(400, f"{place or 'body'}: {problem['msg']}", param=place or None) from error


def make_chat(request: ChatRequest, limits: ImageLimits) -> Chat:
    """The conversation that a request asks to go on; fetches images, so it may take a while.

    Images of a message stand in front of its text, each followed by a new line, as the model saw them in training.

    Raises:
        RecordError: Images out of bounds, ``<image>`` in a text, or a system message that is not the first.
    """
    system, turns, urls = None, [], []
    for place, message in enumerate(request.messages):
        if message.images and message.role != "user":
            raise RecordError(f"messages[{place}] has an image", "images go with role user", "Move it.")
        if message.role in ("system", "developer"):
            if place:
                raise RecordError(f"messages[{place}] is by {message.role}", "it must be the first", "Move it.")
            system = message.text
        elif message.role == "user":
            turns.append(("human", place_images(message.text, len(message.images))))
            urls += message.images
        else:
            turns.append(("gpt", message.text))
    return Chat(
        turns,
        collect_images(urls, limits),
        system=system,
        max_new_tokens=request.max_completion_tokens or request.max_tokens or DEFAULT_TOKENS,
        sampling=request.sampling,
    )


class CompletionReply:
    """Turns pieces of an answer into OpenAI's objects.

    Args:
        request: What was asked.
        bundle: Writes tokens as text.
        identifier: Of the answer.
        model: Name of the model.
        fingerprint: Of what answers.
    """

    def __init__(self, request: ChatRequest, bundle: Bundle, *, identifier: str, model: str, fingerprint: str) -> None:
        self._request = request
        self._bundle = bundle
        self._frame = {
            "id": identifier,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, pieces: Sequence[AnswerPiece]) -> dict[str, Any]:
        """The answer at once."""
        chances = [piece.chance for piece in pieces if piece.chance is not None]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None},
            "logprobs": self._logprobs(chances) if self._request.logprobs else None,
            "finish_reason": pieces[-1].finish,
        }
        return {**self._frame, "object": "chat.completion", "choices": [choice], "usage": usage(pieces)}

    def opening(self) -> bytes:
        """The first event."""
        return self._event({"role": "assistant", "content": ""}, None, None)

    def event(self, piece: AnswerPiece) -> bytes:
        """The event of one piece; empty where there is nothing to tell."""
        if not piece.text and piece.chance is None and piece.finish is None:
            return b""
        return self._event({"content": piece.text} if piece.text else {}, piece.chance, piece.finish)

    def closing(self, pieces: Sequence[AnswerPiece]) -> bytes:
        """What ends a stream: usage where it was asked for, and the mark."""
        options = self._request.stream_options
        end = b"data: [DONE]\n\n"
        if options is None or not options.include_usage:
            return end
        return as_event({**self._frame, "object": "chat.completion.chunk", "choices": [], "usage": usage(pieces)}) + end

    def _event(self, delta: dict[str, str], chance: TokenChance | None, finish: str | None) -> bytes:
        logprobs = None if chance is None else self._logprobs([chance])
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return as_event({**self._frame, "object": "chat.completion.chunk", "choices": [choice]})

    def _logprobs(self, chances: Sequence[TokenChance]) -> dict[str, Any]:
        content = [
            {
                **self._token(chance.token_id, chance.logprob),
                "top_logprobs": [self._token(token, value) for token, value in chance.top],
            }
            for chance in chances
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._bundle.decode_text([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage(pieces: Sequence[AnswerPiece]) -> dict[str, Any]:
    """Tokens of a conversation and its answer; the token that ends it is not counted."""
    asked, written = pieces[-1].prompt_tokens, sum(piece.token_id is not None for piece in pieces)
    return {
        "prompt_tokens": asked,
        "completion_tokens": written,
        "total_tokens": asked + written,
        "prompt_tokens_details": {"cached_tokens": pieces[-1].cached_tokens},
    }


def as_event(content: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
