"""MultiPref: a prompt and two answers a row, which two crowdworkers and two experts compared.

Licence: ODC-BY.

Citation: Miranda, Wang, Elazar, Kumar, Pyatkin et al. (2024), Hybrid Preferences: Learning to Route Instances for Human
vs. AI Feedback, arXiv 2410.19133. Source: allenai/multipref on the Hugging Face hub.

Fields that are read:

    text, completion_a, completion_b
    category                        -> domain: the kind of task
    normal_worker_annotations[], expert_worker_annotations[]
        evaluator                   -> user
        overall_pref                "A-is-clearly-better", "A-is-slightly-better", "Tie", "B-is-slightly-better",
                                    "B-is-clearly-better"

Slight and clear preferences count the same. Whether a worker is an expert is not a type of taste, so `annotator` is not
set.

Checked in the card and in programs that read this set: all names and the five values. Not checked in a real row: that
one evaluator never stands for two people, a crowdworker and an expert.
"""

from data.convert.source import Source, user_turn

PREFERS = {f"{letter}-is-{how}-better": letter for letter in "AB" for how in ("clearly", "slightly")}


def convert(source: Source):
    """Yields the records of all annotations of all rows."""
    for row in source.rows():
        prompt, domain = [user_turn(row.text("text"))], row.text("category")
        a, b = row.text("completion_a"), row.text("completion_b")
        for note in [*row.each("normal_worker_annotations"), *row.each("expert_worker_annotations")]:
            user, choice = note.user("evaluator"), note.text("overall_pref")
            ranking = {"A": [[a], [b]], "B": [[b], [a]], "Tie": [[a, b]]}.get(PREFERS.get(choice, choice))
            if not user:
                source.skip("annotations without an evaluator", row)
            elif ranking is None:
                source.skip(f"annotations with overall_pref {choice!r}", row)
            else:
                yield from source.judgement(row, prompt, ranking, user=user, domain=domain)
