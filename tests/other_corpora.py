"""A few examples in the columns of FollowIR's and Promptriever's training data."""

FOLLOWIR = [
    {"score": float(label == "true"), "label": label, "id": id, "query": query, "instruction": instruction, "document": text}
    for label, id, query, instruction, text in [
        ("true", "301_a", "crime", "Gangs only.", "A gang."),
        ("false", "301_b", "crime", "Gangs only.", "A thief."),
        ("true", "301_c", "crime", "Gangs only.", "Two gangs."),
        ("false", "302_a", "polio", "Recent cases.", "In 1950."),
    ]
]


def passage(text, title="-"):
    return {"docid": "1", "text": text, "title": title}


PROMPTRIEVER = [
    {
        "query_id": "1-standard", "query": "what is rust", "only_query": "what is rust", "only_instruction": "",
        "has_instruction": False, "positive_passages": [passage("Iron oxide.")], "negative_passages": [passage("Gold.")],
        "new_negatives": [],
    },
    {
        "query_id": "1-instruct", "query": "what is rust The language.", "only_query": "what is rust",
        "only_instruction": "The language.", "has_instruction": True,
        "positive_passages": [passage("A compiled language.", "Rust")], "negative_passages": [passage("Gold.")],
        "new_negatives": [passage("Iron oxide.")],
    },
    {
        "query_id": "2-instruct", "query": "tea Green tea.", "only_query": "tea", "only_instruction": "Green tea.",
        "has_instruction": True, "positive_passages": [passage("Sencha.")], "negative_passages": [passage("Assam.")],
        "new_negatives": [],
    },
]  # fmt: skip
