"""Chatbot Arena: a conversation with each of two models a row, and the vote of one judge.

Licence: prompts CC-BY-4.0, model outputs CC-BY-NC-4.0; the set's terms of use must be accepted on its page.

Citation: Zheng, Chiang, Sheng, Zhuang, Wu et al. (2023), Judging LLM-as-a-judge with MT-Bench and Chatbot Arena,
NeurIPS, arXiv 2306.05685. Source: lmsys/chatbot_arena_conversations on the Hugging Face hub;
lmsys/mt_bench_human_judgments has the same fields, without language.

Fields that are read:

    judge                               -> user
    language                            -> domain, if there is one
    conversation_a[], conversation_b[]  {role, content}
    winner                              model_a, model_b, tie or "tie (bothbad)"

A vote is about a complete conversation. If the two conversations differ before their last answers, as most with several
turns do, the last answers have no common prompt, and the row is left out. Later sets of the Arena have no judge.

Checked in the card and in programs that read this set: all names and the values of winner. Not checked in a real row:
whether every judge is one person; the set has about 2.5 votes a judge.
"""

from data.convert.source import Source, messages_of


def convert(source: Source):
    """Yields the record of each row."""
    for row in source.rows():
        user, winner = row.user("judge"), row.text("winner")
        (*prompt, a), (*other, b) = (messages_of(row, f"conversation_{side}") or [{}] for side in "ab")
        ranking = {"model_a": [["a"], ["b"]], "model_b": [["b"], ["a"]]}.get(winner)
        texts = {"a": a.get("content", ""), "b": b.get("content", "")}
        if not user:
            source.skip("votes without a judge", row)
        elif not ranking:
            source.skip("ties" if winner.startswith("tie") else f"votes for {winner!r}", row)
        elif {a.get("role"), b.get("role")} != {"assistant"}:
            source.skip("conversations that do not end with an answer", row)
        elif prompt != other:
            source.skip("conversations that differ before the last answer", row)
        else:
            yield from source.judgement(row, prompt, [[texts[side] for side in group] for group in ranking], user=user,
                                        domain=row.text("language") if "language" in row.fields else "")
