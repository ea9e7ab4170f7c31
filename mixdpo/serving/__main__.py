"""Serves a finished run: `python -m mixdpo.serving RUN`, or `make chat RUN=runs/x`.

A local page where the experts answer side by side, and an endpoint for any client of OpenAI's API. It needs the extra
`serve`. What users choose is kept in RUN/users.sqlite; the run itself is not changed.
"""

import importlib.util
import ipaddress
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mixdpo import config as configs
from mixdpo.config import InputError, check_ranges, reading
from mixdpo.evaluation.completions import with_utilities
from mixdpo.fast.memory import tune_process
from mixdpo.serving.engine import Engine
from mixdpo.serving.facts import facts
from mixdpo.serving.guard import Access, State, host_name
from mixdpo.serving.page import read_page
from mixdpo.serving.policies import ServedRun
from mixdpo.serving.service import Limits, Service
from mixdpo.serving.users import Users, fingerprint, mean_weights

SHORTEST = 16                       # characters of a token


@dataclass(frozen=True)
class ServeConfig:
    """Serves a finished run: a page for people, and OpenAI's API for programs."""

    run: str                        # * a finished run, or a folder of runs; its flag may be omitted
    # --- address
    host: str = "127.0.0.1"         # * address to listen at; any other than this machine's own needs --token
    port: int = 8000                # * port; 0: any that is free
    token: str = ""                 # * every request must send it: 16 characters or more. The page takes it behind a #
    names: tuple[str, ...] = ()     # further names of this machine that a request may have in its Host header
    # --- users
    users: str = ""                 # file of users' comparisons; default: users.sqlite in the folder RUN
    max_users: int = 10_000         # users that are kept
    max_comparisons: int = 1000     # comparisons of a user that are kept
    max_users_file: int = 1024      # size of the file, MiB
    # --- limits
    rows: int = 32                  # answers that are written at the same time
    waiting: int = 64               # answers that may wait for one of these; more are refused with status 429
    max_choices: int = 8            # answers to one request (n)
    max_tokens: int = 0             # tokens of an answer that a request may ask for; 0: what the context leaves
    max_body: int = 256             # size of a request, KiB
    body_seconds: float = 10.0      # time for a request to arrive
    seconds: float = 300.0          # time for an answer
    # --- other
    log_prompts: bool = False       # write requests into the log, prompts included
    data_folder: str = ""           # folder of local files that is searched before anything is downloaded


RANGES = {"port": "[0, 65535]", "max_users": "[1, 1000000]", "max_comparisons": "[1, 100000]",
          "max_users_file": "[1, 1048576]", "rows": "[1, 4096]", "waiting": "[0, 65536]", "max_choices": "[1, 128]",
          "max_tokens": "[0, inf)", "max_body": "[1, 65536]", "body_seconds": "(0, 3600]", "seconds": "(0, 86400]"}


def validate(config: ServeConfig) -> None:
    """Raises: InputError, before anything is loaded."""
    check_ranges(config, RANGES)
    if config.token and (len(config.token) < SHORTEST or not config.token.isascii() or not config.token.isprintable()
                         or " " in config.token):
        raise InputError(f"got {len(config.token)} characters; choose a random text of at least {SHORTEST} printable "
                         "ASCII characters without blanks, as `openssl rand -hex 16` prints", option="token")
    if not is_own(config.host) and not config.token:
        raise InputError(f"got {config.host}, which other machines can reach; give --token TEXT as well, or listen at "
                         "127.0.0.1", option="host")
    for name in config.names:
        if host_name(name) != name.lower():
            raise InputError(f"got {name!r}; give names without a port, as in --names models.example.org",
                             option="names")


def is_own(host: str) -> bool:
    """Whether an address can be reached from this machine alone. A name other than localhost may be any address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def access_of(config: ServeConfig) -> Access:
    """Who may use the server."""
    names = (*Access().names, *config.names, *([] if config.host in ("0.0.0.0", "::") else [config.host]))
    return Access(config.token, names, any_address=not is_own(config.host))


def limits_of(config: ServeConfig) -> Limits:
    """Requests and calls are limited so that --rows and --waiting answers fit, which may come at once."""
    answers = config.rows + config.waiting
    return Limits(config.max_body * 1024, config.body_seconds, config.seconds, config.max_choices, config.max_tokens,
                  max(Limits.requests, 2 * answers), max(Limits.calls, answers))


def users_of(config: ServeConfig, run: str, K: int) -> Users:
    """The file of users. run: the fingerprint of the run. Raises: InputError."""
    file = Path(config.users or Path(config.run) / "users.sqlite")
    return Users(file, run, K, config.max_users, config.max_comparisons, config.max_users_file * 2**20)


def rewards_beside(run: Path) -> Callable[[str], dict[str, float]] | None:
    """A text -> its rewards, those that dataset.json in the run's folder or the one above names; None if there is no
    such file, or if they cannot be computed, for example without a package, which is printed."""
    found = next((path for path in (run / "dataset.json", run.parent / "dataset.json") if path.exists()), None)
    if found is None:
        return None
    with reading(found):
        dataset = dict(json.loads(found.read_text(encoding="utf-8")))
    if "rewards" not in dataset:
        return None

    def rewards(text: str) -> dict[str, float]:
        from data.annotators.rewards import score  # here, because only this needs its packages

        scores = with_utilities(score([text], dataset["rewards"], found.parent), dataset.get("utilities", {}))
        return {name: values[0] for name, values in scores.items()}

    try:
        with reading(found):
            rewards("A text.")
    except (ImportError, InputError) as error:
        print(f"warning: answers are shown without rewards: {error}")
        return None
    return rewards


def serve(config: ServeConfig, served, engine, users: Users, prior, about: dict, score=None) -> None:
    """Serves until a signal. Running answers end, then the engine stops and the file of users is closed.

    served: a ServedRun; engine: its Engine; prior: log w (K,) of a new user; about: what the page says of the run;
    score: a text -> its rewards. Raises: InputError if the address cannot be used."""
    from mixdpo.serving.app import make_app  # here, because only these two need the extra `serve`
    from mixdpo.serving.connection import Times, listen, make_server

    state = State()
    limits = limits_of(config)
    service = Service(served, engine, users, prior, score, limits)
    app = make_app(service, read_page(), about, state, access_of(config), config.log_prompts)
    server = make_server(app, state, Times(body=config.body_seconds + 2, most=max(Times.most, 2 * limits.requests)))
    try:
        with listen(config.host, config.port) as socket:
            host = f"[{config.host}]" if ":" in config.host else config.host
            key = f"/#{config.token}" if config.token else ""
            print(f"{served.name}: {', '.join(service.models)}\nhttp://{host}:{socket.getsockname()[1]}{key}    "
                  "(Ctrl+C stops)", flush=True)
            server.run(sockets=[socket])
    finally:
        engine.stop(finish=not server.force_exit)
        users.close()


def main(argv: list[str]) -> None:
    """The command: RUN may stand first, without --run."""
    tune_process()
    flags = argv if argv and argv[0].startswith("-") else ["--run", *argv]
    config = configs.parse(ServeConfig, flags, "python -m mixdpo.serving RUN")
    validate(config)
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise InputError(f"the server needs {' and '.join(missing)}; install what is missing with pip install -e "
                         f".[serve], or use make chat RUN={config.run}, which does so")
    served = ServedRun.load(config.run, config.data_folder)
    users = users_of(config, fingerprint(served.run.path), served.K)
    serve(config, served, Engine(served, config.rows, config.waiting), users, mean_weights(served.run), facts(served),
          rewards_beside(served.run.path))


if __name__ == "__main__":
    configs.command(main)
