"""UltraFeedback: an instruction and four answers a row, which GPT-4 rated by four criteria. Each criterion is a type of
user who prefers the answer with the higher rating.

Licence: MIT.

Citation: Cui, Yuan, Ding, Yao, Zhu et al. (2023), UltraFeedback: Boosting Language Models with Scaled AI Feedback,
arXiv 2310.01377; the types follow Poddar, Wan, Ivison, Gupta, Jaques (2024), Personalizing Reinforcement Learning from
Human Feedback with Variational Preference Learning, arXiv 2408.10075. Source: openbmb/UltraFeedback on the Hugging Face
hub.

Fields that are read:

    instruction
    completions[]               {response, annotations: {C: {Rating: "1" to "5" or "N/A"}}}, C one of the four criteria
                                helpfulness, honesty, instruction_following, truthfulness

The criterion is both `user` and `annotator` (the true type is known): four users, each of whom judges every row.
`python -m data.ultrafeedback` makes many users of each type instead, and one pair per instruction. Equal ratings are
one group of the ranking. A completion's own system prompt is not part of the prompt.

Checked in data/ultrafeedback.py, which reads the same files.
"""

from data.convert.source import Source, user_turn

TYPES = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def convert(source: Source):
    """Yields the records of all criteria of all rows."""
    for row in source.rows():
        prompt, completions = row.text("instruction"), row.each("completions")
        if not prompt:
            source.skip("rows without an instruction", row)
            continue
        for kind in TYPES:
            rated: dict[float, list[str]] = {}
            for completion in completions:
                rating = completion.at("annotations").at(kind)
                value = None if rating.get("Rating") == "N/A" else rating.number_of("Rating")
                if value is None:
                    source.skip(f"answers without a rating for {kind}", row)
                else:
                    rated.setdefault(value, []).append(completion.text("response"))
            ranking = [rated[rating] for rating in sorted(rated, reverse=True)]
            yield from source.judgement(row, [user_turn(prompt)], ranking, user=kind, annotator=kind)
