"""TL;DR comparisons: a post and two summaries a row, of which one worker chose one.

Licence: none was found on the set's card or in the authors' repository; Reddit users wrote the posts, CNN and the Daily
Mail the articles.

Citation: Stiennon, Ouyang, Wu, Ziegler, Lowe et al. (2020), Learning to summarize from human feedback, NeurIPS, arXiv
2009.01325. Source: the comparisons of openai/summarize_from_feedback on the Hugging Face hub.

Fields that are read:

    worker                      -> user
    info                        {post, title, subreddit}, or {article, title} for a news article
    info.subreddit              -> domain
    summaries[2].text, choice   0 or 1: the summary that is better
    split                       train, valid1 or valid2; --split NAME takes rows of one split (default: all)

Prompts are texts, not messages, in the form of the paper's policies: "SUBREDDIT: r/...", "TITLE: ...", "POST: ...",
"TL;DR:" with an empty line between them; for an article "Article: ..." and "TL;DR:". A summary keeps the
blank that it begins with.

Checked in the card and the example of the authors' repository: all names. Not checked in a real row: rows of articles;
whether all summaries begin with a blank.
"""

from data.convert.source import Row, Source


def prompt_of(info: Row) -> str:
    """The text before a summary; "" if there is neither a post nor an article."""
    if info.fields.get("article") and not info.fields.get("post"):
        return f"Article: {info.text('article')}\n\nTL;DR:"
    post = info.text("post")
    head = f"SUBREDDIT: r/{info.text('subreddit')}\n\nTITLE: {info.text('title')}"
    return post and f"{head}\n\nPOST: {post}\n\nTL;DR:"


def convert(source: Source, split: str = ""):
    """Yields the record of each row."""
    for row in source.rows():
        info, user, choice = row.at("info"), row.user("worker"), row.number_of("choice")
        texts, prompt = [summary.text("text") for summary in row.each("summaries")], prompt_of(info)
        if row.text("split") != split and split:
            source.skip(f"rows of another split than {split}", row)
        elif not user:
            source.skip("rows without a worker", row)
        elif len(texts) != 2 or choice not in (0, 1):
            source.skip("rows without two summaries and a choice of one of them", row)
        elif not prompt:
            source.skip("rows without a post", row)
        else:
            better = texts[int(choice)], texts[1 - int(choice)]
            domain = info.text("subreddit") if "subreddit" in info.fields else ""
            yield from source.judgement(row, prompt, [[text] for text in better], user=user, domain=domain)
