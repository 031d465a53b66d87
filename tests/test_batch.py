"""What a batch asks for: a pure function of its strings, without a model."""

import torch

from sentence_transformers_inf.losses.batch import Record, draw, plan

RECORDS = [
    [("I+ of 1", "q+ of 1"), ("I- of 1", "q+ of 1"), ("I+ of 1", "q- of 1")],
    [("I+ of 2", "q+ of 2"), ("I- of 2", "q+ of 2"), ("I+ of 2", "q- of 2")],
    [("I+ of 3", "q+ of 3"), ("I- of 3", "q+ of 3"), ("I+ of 3", "q- of 3")],
    [("I+ of 4", "q+ of 4"), ("I- of 4", "q+ of 4"), ("I+ of 4", "q- of 4")],
]
ALL = range(len(RECORDS))


def drawn(seed=1, own=ALL, sampled=3, plain=True):
    return draw(RECORDS, own, sampled_instructions=sampled, plain=plain, seed=seed)


def records(pairs=RECORDS):
    return [Record(list(of), [f"passage of {pair}" for pair in of], []) for of in pairs]


def test_candidates_are_drawn_by_seed_and_never_equal_the_row():
    candidates = drawn().candidates
    assert candidates == drawn().candidates
    assert candidates != drawn(seed=2).candidates
    rows = [row for record in RECORDS for row in record]
    for (instruction, query), of_row in zip(rows, candidates):
        assert len(of_row) == len(set(of_row)) == 4
        assert all(other != instruction and same == query for other, same in of_row)
    for record, start in zip(RECORDS, range(0, 12, 3)):
        positive, negative = record[0][0], record[1][0]
        assert [candidates[start + row][0][0] for row in range(3)] == [negative, positive, negative], "the twin comes first"


def test_two_processes_draw_what_one_draws():
    whole = drawn()
    first, second = drawn(own=range(2)), drawn(own=range(2, 4))
    assert first.candidates + second.candidates == whole.candidates
    assert first.plain + [(query, row + 6) for query, row in second.plain] == whole.plain


def test_without_an_instruction_term_there_are_no_candidates():
    assert drawn(sampled=None).candidates == [[]] * 12
    assert drawn(plain=False).plain == []


def test_every_distinct_text_has_one_number_and_every_row_finds_its_own():
    twice = [RECORDS[0], RECORDS[1], RECORDS[0]]
    draws = draw(twice, range(3), sampled_instructions=0, plain=True, seed=0)
    step = plan(records(twice), range(3), draws)
    texts = [*step.pairs, *step.passages]
    assert len(texts) == len(set(texts))
    rows = [pair for record in twice for pair in record]
    assert [texts[at] for at in step.query.tolist()] == rows
    assert [texts[at] for at in step.passage.tolist()] == [f"passage of {pair}" for pair in rows]
    assert step.query[:3].tolist() == step.query[6:].tolist()
    assert step.not_negative[0].nonzero().flatten().tolist() == [0, 6], "the same record is no negative"


def test_what_a_row_of_the_batch_pairs_is_no_negative_candidate():
    draws = draw(RECORDS, ALL, sampled_instructions=0, plain=False, seed=0)
    same_passage = [Record(list(of), ["one passage"] * 3, []) for of in RECORDS]
    step = plan(same_passage, ALL, draws)
    assert step.not_candidate[0].tolist() == [True, True], "the twin has the row's own passage here"
    assert plan(records(), ALL, draws).not_candidate[0].tolist() == [True, False]


def test_a_bare_query_is_answered_by_all_passages_of_its_rows():
    draws = drawn()
    step = plan(records(), ALL, draws)
    for number, (query, row) in enumerate(draws.plain):
        answers = {
            at for record in range(4) for at in range(3 * record, 3 * record + 3) if RECORDS[record][at % 3][1] == query
        }
        assert row in answers
        assert set(step.not_plain_negative[number].nonzero().flatten().tolist()) == answers - {row}


def test_further_negatives_count_once_and_not_where_they_are_passages():
    rows = [
        Record([("I", "q1")], ["right 1"], ["wrong 1"]),
        Record([("I", "q2")], ["right 2"], ["right 1"]),
        Record([("I", "q3")], ["right 3"], ["wrong 1"]),
    ]
    step = plan(
        rows, range(3), draw([record.pairs for record in rows], range(3), sampled_instructions=None, plain=True, seed=0)
    )
    assert step.new_negatives.tolist() == [0]
    assert step.not_negative.shape == (3, 4)
    assert torch.equal(step.not_plain_negative[:, 3], torch.tensor([True, False, False])), "not for its own record's query"
