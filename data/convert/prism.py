"""PRISM: one answer of a conversation a row, with its score. Up to four models answer the first turn; the chosen one
answers each later turn twice.

Licence: human-written texts CC-BY-4.0, model responses CC-BY-NC-4.0; the model providers' licences hold too.

Citation: Kirk, Whitefield, Röttger, Bean, Margatina et al. (2024), The PRISM Alignment Project: What Participatory,
Representative and Individualised Human Feedback Reveals About the Subjective and Multicultural Alignment of Large
Language Models, arXiv 2404.16019. Source: utterances.jsonl of HannahRoseKirk/prism-alignment on the Hugging Face hub.

Fields that are read:

    user_id                     -> user
    conversation_id, turn       turns count from 0
    user_prompt, model_response
    score                       from 1 to 100; equal scores are one group of the ranking
    if_chosen                   true for the answer with which the conversation continues

The prompt of a later turn is the conversation along the chosen answers. The rows of a conversation may stand in any
order. A turn whose chosen answer has not the highest score contradicts itself and is left out.

Checked in the card and in programs that read this set: all names, turns from 0, several chosen answers with the same
text. Not checked in a real row: how one of several highest scores was chosen; here they are a tie.
"""

import itertools

from data.convert.source import Row, Source, user_turn


def ranking_of(source: Source, answers: list[Row]) -> list[list[str]]:
    """The texts by score, highest first; equal scores are one group. Answers without a score are left out."""
    scored = [(answer.number_of("score"), answer.text("model_response"), answer) for answer in answers]
    for *_, answer in (one for one in scored if one[0] is None):
        source.skip("answers without a score", answer)
    order = sorted((one for one in scored if one[0] is not None), key=lambda one: -one[0])
    return [[text for _, text, _ in group] for _, group in itertools.groupby(order, key=lambda one: one[0])]


def is_chosen(answer: Row) -> bool:
    """if_chosen, also as a table writes it."""
    return answer.get("if_chosen") in (True, "True", "true", "1")


def convert(source: Source):
    """Yields the records of all turns of all conversations, in the order of the conversations' first rows."""
    talks: dict[str, dict[float, list[Row]]] = {}
    for row in source.rows():
        talk, turn = row.user("conversation_id"), row.number_of("turn")
        if talk and turn is not None:
            talks.setdefault(talk, {}).setdefault(turn, []).append(row)
        else:
            source.skip("answers without a conversation or a turn", row)
    for turns in talks.values():
        messages: list[dict] = []
        for place, turn in enumerate(sorted(turns)):
            answers = turns[turn]
            row, prompts = answers[0], {answer.text("user_prompt") for answer in answers}
            chosen = {answer.text("model_response") for answer in answers if is_chosen(answer)}
            users = {answer.user("user_id") for answer in answers}
            if place != turn or len(messages) < 2 * place:
                source.skip("turns after one that is missing or cannot be followed", row)
                continue
            if len(prompts) > 1 or "" in prompts:
                source.skip("turns without a prompt, or with several", row)
                continue
            ranking, messages = ranking_of(source, answers), [*messages, user_turn(prompts.pop())]
            if "" in users or len(users) > 1:
                source.skip("turns without a user, or of two", row)
            elif ranking and not chosen <= {*ranking[0]}:
                source.skip("turns whose chosen answer has not the highest score", row)
            else:
                yield from source.judgement(row, messages, ranking, user=users.pop())
            if len(chosen) == 1 and "" not in chosen:                       # else no later turn can be followed
                messages = [*messages, {"role": "assistant", "content": chosen.pop()}]
