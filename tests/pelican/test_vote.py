"""The vote: fair orders, votes that are kept whatever happens, and their tally."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawings import answer
from moelocal.errors import RequestError
from moelocal.pelican import vote
from moelocal.pelican.vote import Vote, Votes

HEADER = "date\tround\tballot\tprompt\tmodels\tchosen"


def refusal(call, *arguments) -> str:
    with pytest.raises(RequestError) as error:
        call(*arguments)
    return str(error.value)


def two(count: int = 2) -> list:
    return [answer(model, seed) for model in ("one", "two") for seed in range(count)]


# ballots


def test_a_ballot_has_one_picture_of_each_model():
    answers = [
        *two(3),
        answer("three", None),
        answer("one", 0, prompt="Draw a crab"),
        answer("two", 0, prompt="Draw a crab"),
    ]
    found = vote.ballots(answers, 1)
    assert [sorted(each.model for each in ballot) for ballot in found] == [
        ["one", "three", "two"], ["one", "two"], ["one", "two"], ["one", "two"]
    ]  # fmt: skip
    assert [{each.prompt for each in ballot} for ballot in found] == [{"Draw a pelican"}] * 3 + [
        {"Draw a crab"}
    ]
    assert [{each.seed for each in ballot} - {None} for ballot in found] == [{0}, {1}, {2}, {0}]


def test_the_order_is_drawn_from_the_seed_and_favours_nobody():
    answers = [answer(model, seed) for model in ("one", "two", "three") for seed in range(4)]
    assert vote.ballots(answers, 7) == vote.ballots(answers, 7)
    orders = Counter(
        tuple(a.model for a in ballot) for seed in range(150) for ballot in vote.ballots(answers, seed)
    )
    # 600 draws of 6 orders: 100 each, standard deviation 9.1; 40 away never happens by chance
    assert len(orders) == 6 and all(abs(count - 100) < 40 for count in orders.values())


def test_one_model_alone_is_no_vote():
    assert refusal(vote.ballots, [answer()], 1) == (
        "--blind compares models, got one: one; name more with --model, --server or --svgs"
    )


# what is typed


def test_votes_are_read_as_they_are_typed():
    ballots = [[answer("one"), answer("two")], [answer("two"), answer("one")]]
    assert vote.choices(["2=a", "1=B"], ballots) == {2: "two", 1: "two"}
    assert vote.choices(["1 = none"], ballots) == {1: "none"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["3=A"], "vote '3=A': expected a ballot from 1 to 2, as in 1=A"),
        (["A"], "vote 'A': expected a ballot from 1 to 2, as in 1=A"),
        (["²=A"], "vote '²=A': expected a ballot from 1 to 2, as in 1=A"),
        (["1=C"], "vote '1=C': expected A, B or none after the ="),
        (["1="], "vote '1=': expected A, B or none after the ="),
        (["1=AB"], "vote '1=AB': expected A, B or none after the ="),
        (["1=A", "1=B"], "vote '1=B': ballot 1 has a vote already"),
    ],
)
def test_what_is_no_vote_is_refused(words, told):
    assert refusal(vote.choices, words, [[answer("one"), answer("two")]] * 2) == told


# the file


def test_votes_are_kept_and_read_back(tmp_path):
    votes = Votes(tmp_path / "votes.tsv")
    assert votes.read() == []
    ballots = [[answer("a\\t| é", prompt='tab\t"line"\nend'), answer("b")], [answer("b"), answer("a\\t| é")]]
    votes.add("r1", {2: "b"}, ballots)
    votes.add("r1", {1: "none"}, ballots)
    votes.add("r2", {1: "a\\t| é"}, ballots)
    found = votes.read()
    assert [(v.round, v.ballot, v.models, v.chosen) for v in found] == [
        ("r1", 2, ("b", "a\\t| é"), "b"), ("r1", 1, ("a\\t| é", "b"), "none"), ("r2", 1, ("a\\t| é", "b"), "a\\t| é")
    ]  # fmt: skip
    assert found[1].prompt == 'tab\t"line"\nend'
    assert (tmp_path / "votes.tsv").read_text().splitlines()[0] == HEADER


def test_a_ballot_is_voted_on_once(tmp_path):
    votes = Votes(tmp_path / "votes.tsv")
    ballots = [[answer("one"), answer("two")]] * 2
    votes.add("r", {1: "one"}, ballots)
    assert refusal(votes.add, "r", {2: "two", 1: "two"}, ballots) == (
        "vote 1: this ballot was voted on, and its names are shown; for a new order run "
        "`moelocal pelican --blind` again"
    )
    assert [each.ballot for each in votes.read()] == [1]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "line 1: expected the columns date, round, ballot, prompt, models, chosen"),
        ("a\tb\n", "line 1: expected the columns date, round, ballot, prompt, models, chosen"),
        (f"{HEADER}\nx\n", "line 2: is no vote; put it right or delete the line"),
        (f'{HEADER}\nd\tr\t1\t"p"\t["a"]\ta\nd\tr\t1\t"p"\t["a"]\tb\n',
         "line 3: is no vote; put it right or delete the line"),
        (f'{HEADER}\nd\tr\tone\t"p"\t["a"]\ta\n', "line 2: is no vote; put it right or delete the line"),
        (f'{HEADER}\nd\tr\t1\t"p"\t3\ta\n', "line 2: is no vote; put it right or delete the line"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_and_left_as_it_is(tmp_path, content, told):
    file = tmp_path / "votes.tsv"
    file.write_text(content)
    assert refusal(Votes(file).add, "r", {1: "a"}, [[answer("a"), answer("b")]]) == f"{file}: {told}"
    assert file.read_text() == content


def test_a_vote_that_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    votes = Votes(tmp_path / "votes.tsv")
    ballots = [[answer("one"), answer("two")]] * 2
    votes.add("r", {1: "one"}, ballots)
    before = votes.file.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    for step in ("os.fsync", "pathlib.Path.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(step, full)
            assert refusal(votes.add, "r", {2: "two"}, ballots) == (
                f"{votes.file}: cannot be written: No space left on device"
            )
        assert votes.file.read_bytes() == before
        assert sorted(file.name for file in tmp_path.iterdir()) == ["votes.tsv"]


def test_votes_at_the_same_time_are_all_kept(tmp_path):
    file = tmp_path / "votes.tsv"
    ballots = [[answer("one"), answer("two")]] * 5

    def person(number: int) -> None:
        for ballot in range(1, 6):
            Votes(file).add(f"round {number}", {ballot: "one"}, ballots)

    with ThreadPoolExecutor() as people:
        list(people.map(person, range(3)))
    found = Counter((each.round, each.ballot) for each in Votes(file).read())
    assert found == {(f"round {number}", ballot): 1 for number in range(3) for ballot in range(1, 6)}


# the tally


def a_vote(models: str, chosen: str) -> Vote:
    return Vote("d", "r", 1, "p", tuple(models), chosen)


def test_the_tally_counts_wins_on_the_ballots_of_each_model():
    found = vote.tally([a_vote("ab", "a"), a_vote("bac", "a"), a_vote("cb", "none"), a_vote("ba", "b")])
    assert [(s.model, s.wins, s.ballots, s.chance) for s in found] == [
        ("a", 2, 3, pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)),
        ("b", 1, 4, pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4)),
        ("c", 0, 2, pytest.approx((1 / 3 + 1 / 2) / 2)),
    ]
    assert vote.tally([]) == []


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    # to four digits as in Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_that_of_wilson(wins, count, low, high):
    assert vote.wilson(wins, count) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share_and_is_symmetric(case):
    wins, count = case
    low, high = vote.wilson(wins, count)
    # rounding of a double
    assert 0 <= low <= wins / count + 1e-12 and wins / count - 1e-12 <= high <= 1
    assert vote.wilson(count - wins, count) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    draw = random.Random(0)
    inside = 0
    for _ in range(4000):
        share, count = draw.uniform(0.05, 0.95), draw.randint(5, 60)
        low, high = vote.wilson(sum(draw.random() < share for _ in range(count)), count)
        inside += low <= share <= high
    # 95 % on average over shares; standard error 0.35 %
    assert 0.935 < inside / 4000 < 0.965
