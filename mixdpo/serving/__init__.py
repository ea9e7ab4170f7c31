"""A finished run behind an OpenAI-compatible endpoint, and a local page where its experts answer side by side. Only
app, responses and connection import starlette and uvicorn (the extra `serve`).

    trunks       the models that requests pass through, and each policy as (trunk, adapter, head)
    policies     ServedRun: what a run offers; ids of a prompt, weights, margins, scores
    decoder      the rows that decode together on one trunk
    engine       continuous batching: requests join and leave the running batch at every token

    bodies       bytes of a request -> an object that is safe to use; errors
    protocol     objects -> checked requests
    users        comparisons of users in SQLite, and the posteriors that follow
    texts        tokens -> text that can be shown: whole characters, stop sequences
    generation   the choices of one request on the engine
    answers      answers and chunks in OpenAI's form
    service      what the routes do, without HTTP
    facts        what the page says of a run
    responses    bodies in, answers and streams out, clients that leave
    guard        hosts, origins, tokens, headers, log
    app, page    routes; the page and its policy
    connection   sockets: time limits, malformed HTTP, a stop that lets answers finish
    __main__     the command
"""
