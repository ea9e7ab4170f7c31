"""The result of a job: the sentences that an evaluation ends with, and the two tables behind them.

    own reward      what each user gets from the policy that this user is served (mixdpo/evaluation/frontier.py)
    accuracy        share of held-out choices that a run predicts with the weights of the user who made them
"""

from data.report.job import Job
from data.report.tables import escape, pm, section, table
from mixdpo.evaluation.frontier import own_reward_table
from mixdpo.evaluation.tables import sentences

OWN_REWARD = (
    "Own reward is each user's reward on completions by the policy that this user is served, minus the reference's; "
    "mean over users and prompts ± standard error over prompts. More KL to the reference buys more reward with any "
    "method, so methods are compared at equal KL: the baseline is the frontier of all methods with one policy. Known "
    "types: one policy per type, told which user is of which type, which is the ceiling.")
ACCURACY = "Accuracy is the share of held-out choices that a run predicts with the weights of the user who chose."


def accuracy_table(job: Job) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: held-out accuracy of each run, of all pairs and by type."""
    of = job.results["preferences"]
    kinds = [kind for kind in job.dataset.get("annotators", []) if all(kind in row["types"] for row in of.values())]
    head = ["run", "experts", "accuracy", *(f"accuracy, {kind}" for kind in kinds)]
    rows = [[run, str(row["experts"]), pm(row["accuracy_own"]), *(pm(row["types"][k]["accuracy"]) for k in kinds)]
            for run, row in of.items()]
    return head, rows


def result(job: Job, *pictures: str) -> str:
    """The section that opens the report. pictures: Markdown links."""
    found = sentences(job.results)
    parts = list(pictures)
    for note, (head, rows) in ((OWN_REWARD, own_reward_table(job.results)), (ACCURACY, accuracy_table(job))):
        if rows:
            head = [escape(cell.replace("\n", " ")) for cell in head]
            parts += [note, table(head, [[*map(escape, row)] for row in rows])]
    return section("Result", escape(" ".join(found) or "Nothing was evaluated."), *parts)
