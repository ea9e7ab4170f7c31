"""The server's routes (starlette).

    GET    /                                the page                        GET  /health
    GET    /v1/models                       models that a request may name
    POST   /v1/completions                  OpenAI's, complete or as a stream of events
    POST   /v1/chat/completions             the same
    GET    /v1/users/ID                     a user's posterior over experts, after each comparison
    DELETE /v1/users/ID                     forgets the user
    POST   /v1/users/ID/preferences         one more comparison
    GET    /v1/users/ID/preferences         the comparisons, as train.py reads them
    GET    /api/run                         what the page says of the run
    POST   /api/weights                     weights of a prompt
    POST   /api/score                       a completion under every policy

No path of a request reaches the file system: the page is read at the start, and everything else is JSON or plain text.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router

from mixdpo.serving.answers import Answer, json_lines
from mixdpo.serving.bodies import Refused, check_name, read_object
from mixdpo.serving.generation import Choices
from mixdpo.serving.guard import Access, Guard, State, log_line
from mixdpo.serving.page import Page
from mixdpo.serving.protocol import read_chat, read_choice, read_completion, read_query
from mixdpo.serving.responses import EventStream, Gone, as_json, attend, read_body
from mixdpo.serving.service import Service
from mixdpo.serving.users import as_record


@dataclass
class Routes:
    """The server's answers to requests that have passed the guard."""

    service: Service
    page: Page
    facts: dict                     # of GET /api/run
    state: State
    log_prompts: bool = False
    log: Callable[[str], None] = log_line
    router: Router = field(init=False)

    def __post_init__(self):
        user = "/v1/users/{user}"
        self.router = Router(redirect_slashes=False, routes=[
            Route(path, function, methods=[method]) for method, path, function in (
                ("GET", "/", self.show_page), ("GET", "/health", self.health), ("GET", "/api/run", self.run),
                ("GET", "/v1/models", self.models), ("GET", "/v1/models/{model}", self.model),
                ("POST", "/v1/completions", self.completions), ("POST", "/v1/chat/completions", self.chat),
                ("POST", "/api/weights", self.weights), ("POST", "/api/score", self.score))] + [
            Route(user, each_method({"GET": self.user, "DELETE": self.forget}), methods=["GET", "DELETE"]),
            Route(f"{user}/preferences", each_method({"GET": self.preferences, "POST": self.prefer}),
                  methods=["GET", "POST"])])

    async def __call__(self, scope, receive, send) -> None:
        scope["app"] = self.router                                          # so that 404 and 405 are exceptions
        try:
            await self.router(scope, receive, send)
        except HTTPException as error:
            allowed = (error.headers or {}).get("Allow", "")
            if error.status_code == 405:
                raise Refused(405, f"this path does not take {scope['method'][:20]}; send {allowed}",
                              headers={"Allow": allowed}) from None
            raise Refused(404, "there is nothing at this path; GET /v1/models, POST /v1/completions and POST "
                          "/v1/chat/completions are among those that exist") from None
        except Gone:
            pass                                                            # nobody reads an answer

    async def body(self, request: Request) -> dict:
        limits = self.service.limits
        body = read_object(await read_body(request, limits.body, limits.body_seconds))
        if self.log_prompts:
            request.scope["note"]["body"] = ascii(body)
        return body

    async def attend(self, request: Request, work: Awaitable):
        return await attend(request, work, self.service.limits.seconds)

    # --- the page and the run

    async def show_page(self, request: Request) -> Response:
        return Response(self.page.body, media_type="text/html", headers={"Content-Security-Policy": self.page.policy})

    async def health(self, request: Request) -> Response:
        engine = self.service.engine
        return as_json({"status": "stopping" if self.state.stopping else "ok", "rows": engine.rows_now,
                        "waiting": engine.waiting_now})

    async def run(self, request: Request) -> Response:
        return as_json(self.facts)

    async def models(self, request: Request) -> Response:
        return as_json({"object": "list", "data": [self.described(name) for name in self.service.models]})

    async def model(self, request: Request) -> Response:
        if (name := request.path_params["model"]) not in self.service.models:
            raise Refused(404, f"there is no model {ascii(name)[:60]}; this server has "
                          f"{', '.join(self.service.models)}", "model", "model_not_found")
        return as_json(self.described(name))

    def described(self, name: str) -> dict:
        return {"id": name, "object": "model", "created": self.state.began, "owned_by": "mixdpo"}

    # --- completions

    async def completions(self, request: Request) -> Response:
        return await self.complete(request, read_completion)

    async def chat(self, request: Request) -> Response:
        return await self.complete(request, read_chat)

    async def complete(self, request: Request, read: Callable) -> Response:
        """One request for completions, from its body to its answer."""
        deadline = asyncio.get_running_loop().time() + self.service.limits.seconds
        ask = read(await self.body(request), self.service.limits.choices)
        answer, requests = await attend(request, self.service.prepare(ask), left(deadline))
        choices, note = self.service.submit(ask, requests), request.scope["note"]
        note.update(model=ask.model, experts=answer.experts)

        def end() -> None:
            choices.cancel()
            note.update(tokens=choices.tokens)

        if ask.stream:
            return EventStream(events(answer, choices), end, left(deadline), self.log)
        try:
            pieces = await attend(request, all_of(choices.pieces()), left(deadline))
        finally:
            end()
        return as_json(answer.complete(pieces, choices.tokens))

    # --- users

    async def user(self, request: Request) -> Response:
        return as_json(await self.service.user(user_of(request)))

    async def forget(self, request: Request) -> Response:
        user = user_of(request)
        return as_json({"user": user, "forgotten": await self.service.stored(self.service.users.forget, user)})

    async def prefer(self, request: Request) -> Response:
        user, choice = user_of(request), read_choice(await self.body(request))
        return as_json(await self.attend(request, self.service.add(user, choice)))

    async def preferences(self, request: Request) -> Response:
        user = user_of(request)
        found = await self.service.stored(self.service.users.comparisons, user)
        return PlainTextResponse(json_lines([as_record(user, comparison) for comparison in found]), headers={
            "Content-Disposition": f'attachment; filename="preferences-{user}.jsonl"'})

    # --- what the page asks

    async def weights(self, request: Request) -> Response:
        query = read_query(await self.body(request), False)
        return as_json(await self.attend(request, self.weights_of(query)))

    async def weights_of(self, query) -> dict:
        gate, own = await self.service.weights((await self.service.encode(query.prompt))[0], query.user)
        return {"weights": own.exp().tolist(), "gate": gate.exp().tolist()}

    async def score(self, request: Request) -> Response:
        return as_json(await self.attend(request, self.service.scores(read_query(await self.body(request), True))))


def each_method(functions: dict[str, Callable]) -> Callable:
    """A route's function that calls one by the request's method."""
    async def function(request: Request) -> Response:
        return await functions["GET" if request.method == "HEAD" else request.method](request)

    return function


def user_of(request: Request) -> str:
    return check_name(request.path_params["user"])


def left(deadline: float) -> float:
    """Seconds until a moment of the loop's clock."""
    return deadline - asyncio.get_running_loop().time()


async def all_of(found: AsyncIterator) -> list:
    return [each async for each in found]


async def events(answer: Answer, choices: Choices) -> AsyncIterator[dict]:
    """The chunks of a stream."""
    yield answer.first_chunk()
    async for piece in choices.pieces():
        if piece.text or piece.reason or piece.placed and answer.ask.logprobs is not None:  # not a part of a character
            yield answer.next_chunk(piece)
    if answer.ask.usage:
        yield answer.last_chunk(choices.tokens)


def make_app(service: Service, page: Page, facts: dict, state: State, access: Access | None = None,
             log_prompts: bool = False, log: Callable[[str], None] = log_line) -> Guard:
    """The ASGI application."""
    access = access or Access()
    routes = Routes(service, page, facts, state, log_prompts, log)
    return Guard(routes, state, access.token, access.names, access.any_address, service.limits.requests, log)
