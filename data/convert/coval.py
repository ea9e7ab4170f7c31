"""CoVal, first published as Collective Alignment 1: a prompt and four answers a row, which some annotators ranked.

Licence: CC-BY-4.0, as two listings of the set say; read the card.

Citation: OpenAI (2025), Collective Alignment 1 (CA-1); OpenAI (2026), CoVal: Learning values-aware rubrics from the
crowd. Source: comparisons.jsonl of openai/collective-alignment-1 or openai/coval on the Hugging Face hub.

Fields that are read:

    prompt.messages[]           {role, content}; a developer's message becomes a system turn
    responses[]                 {response_index: "A" to "D", messages[]: one assistant's message}
    metadata.assessments[]      {annotator_id, ranking_blocks: {personal: [{ranking}], world: [{ranking}]}}

    annotator_id                -> user
    ranking                     "B>A=C=D": B is best, the others are equal

--block personal (default) reads what the annotator prefers, --block world what the annotator thinks best for the world.
These are two questions: convert them to two files. If a block has several rankings, the first is read.

Checked in programs that read this set: all names, letters as indices, empty blocks, the developer's role, answers of
several messages (left out here). Not checked in a real row: whether an annotator_id can be missing.
"""

from data.convert.source import Row, Source, messages_of
from mixdpo.config import InputError

BLOCKS = ("personal", "world")


def parse_ranking(text: str) -> list[list[str]]:
    """ "B>A=C=D" -> [["B"], ["A", "C", "D"]]."""
    return [[name.strip() for name in group.split("=")] for group in text.split(">")]


def answers_of(source: Source, row: Row) -> dict[str, str]:
    """Letter -> text; "" for an answer that is not one assistant's message, or if two answers have the letter."""
    found = {}
    for response in row.each("responses"):
        messages = messages_of(response, "messages")
        if [message["role"] for message in messages] != ["assistant"]:
            source.skip("answers that are not one assistant's message", row)
            messages = [{"content": ""}]
        if (letter := response.text("response_index")) in found:
            source.skip("answers with the letter of another one, and that one", row)
            messages = [{"content": ""}]
        found[letter] = messages[0]["content"]
    return found


def convert(source: Source, block: str = "personal"):
    """Yields the records of all assessments of all rows."""
    if block not in BLOCKS:
        raise InputError(f"got {block!r}; choose one of {', '.join(BLOCKS)}", option="block")
    for row in source.rows():
        prompt, answers = messages_of(row.at("prompt"), "messages"), answers_of(source, row)
        for assessment in row.at("metadata").each("assessments"):
            user, blocks = assessment.user("annotator_id"), assessment.at("ranking_blocks").each(block)
            ranking = parse_ranking(blocks[0].text("ranking") if blocks else "")
            names = [name for group in ranking for name in group]
            for _ in blocks[1:]:
                source.skip("further rankings of one assessment", row)
            if not user:
                source.skip("rankings without an annotator", row)
            elif names == [""]:
                source.skip("assessments without a ranking", row)
            elif len({*names}) < len(names) or not {*names} <= answers.keys():
                source.skip("rankings that name an answer twice or an unknown answer", row)
            else:
                yield from source.judgement(row, prompt, [[answers[n] for n in group] for group in ranking], user=user)
