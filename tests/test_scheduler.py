"""The order in which rows run, without threads and clocks."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from reparam.service.engine.scheduler import Batch, Scheduler, Ticket

LIMIT = 8


def new_scheduler() -> Scheduler[Any]:
    scheduler = Scheduler[Any]()
    for model in "abm":
        scheduler.set_limit(model, LIMIT)
    return scheduler


def added(scheduler: Scheduler[Any], rows: int, granted: int | None = None, model: str = "m") -> Ticket[Any]:
    ticket: Ticket[Any] = Ticket(None, model, rows)
    ticket.owner = ticket  # a batch names owners
    scheduler.grant(ticket, rows if granted is None else granted)
    return ticket


def taken(scheduler: Scheduler[Any]) -> dict[Ticket[Any], int]:
    """Take the next batch. Returns the rows of each ticket."""
    batch = scheduler.take()
    return {piece.owner: piece.hi - piece.lo for piece in batch.pieces} if batch else {}


def test_waiting_rows_share_a_batch_which_says_why_it_closed() -> None:
    scheduler = new_scheduler()
    assert scheduler.take() is None
    first, second = added(scheduler, 2), added(scheduler, 3)
    batch = scheduler.take()
    assert batch is not None
    assert [(piece.owner, piece.lo, piece.hi) for piece in batch.pieces] == [(first, 0, 2), (second, 0, 3)]
    assert (batch.rows, batch.closed) == (5, "drained")
    added(scheduler, LIMIT)
    full = scheduler.take()
    assert full is not None
    assert full.closed == "full"


def test_free_runners_share_waiting_rows_if_each_gets_enough() -> None:
    scheduler = new_scheduler()
    scheduler.set_limit("m", 64)
    added(scheduler, 40)
    batches = [scheduler.take(runners=2), scheduler.take(runners=1)]
    assert [(batch.rows, batch.closed) for batch in batches if batch] == [(20, "shared"), (20, "drained")]
    added(scheduler, 20)
    batches = [scheduler.take(runners=2), scheduler.take(runners=1)]
    assert [(batch.rows, batch.closed) for batch in batches if batch] == [(16, "shared"), (4, "drained")]


def test_requests_that_fit_a_batch_are_not_split() -> None:
    scheduler = new_scheduler()
    tickets = [added(scheduler, LIMIT) for _ in range(3)]
    assert [taken(scheduler) for _ in range(3)] == [{ticket: LIMIT} for ticket in tickets]


def test_a_new_request_runs_before_a_long_one_which_gets_the_next_batch() -> None:
    scheduler = new_scheduler()
    long = added(scheduler, 1000)
    assert taken(scheduler) == {long: LIMIT}
    first, second = added(scheduler, 1), added(scheduler, 1)
    batch = scheduler.take()
    assert batch is not None
    assert (batch.pieces, batch.closed) == ([(first, 0, 1), (second, 0, 1)], "fresh")
    third = added(scheduler, 1)
    assert taken(scheduler) == {third: 1, long: LIMIT - 1}


def test_a_long_request_keeps_half_of_each_batch_beside_many_new_ones() -> None:
    scheduler = new_scheduler()
    long = added(scheduler, 1000)
    taken(scheduler)
    for _ in range(20):
        for _ in range(LIMIT):
            added(scheduler, 1)
        assert taken(scheduler)[long] == LIMIT // 2


@pytest.mark.parametrize("limit", [1, 2, 3, LIMIT, 64])
def test_new_requests_do_not_starve_a_long_one(limit: int) -> None:
    """The long request gets every other batch, or half of each batch."""
    for new in (1, limit // 4 + 1, limit):
        scheduler = new_scheduler()
        scheduler.set_limit("m", limit)
        long = added(scheduler, 10_000)
        taken(scheduler)
        before = long.taken
        for _ in range(20):
            for _ in range(new):
                added(scheduler, 1)
            taken(scheduler)
        assert long.taken - before >= 10 * (limit // 2 or 1)


def test_long_requests_take_turns() -> None:
    scheduler = new_scheduler()
    tickets = [added(scheduler, 1000) for _ in range(3)]
    for _ in range(30):
        taken(scheduler)
    shares = [ticket.taken for ticket in tickets]
    assert sum(shares) == 30 * LIMIT
    assert max(shares) - min(shares) <= 2 * LIMIT


def test_a_request_that_had_a_turn_is_not_new_when_more_rows_are_granted() -> None:
    scheduler = new_scheduler()
    long = added(scheduler, 1000, granted=LIMIT)
    taken(scheduler)
    scheduler.grant(long, LIMIT)
    first = added(scheduler, 1)
    assert taken(scheduler) == {first: 1}


def test_a_new_request_shares_the_batch_if_all_rows_fit() -> None:
    scheduler = new_scheduler()
    long = added(scheduler, 1000, granted=LIMIT)
    taken(scheduler)
    scheduler.grant(long, LIMIT - 1)
    first = added(scheduler, 1)
    assert taken(scheduler) == {first: 1, long: LIMIT - 1}


def test_rows_left_of_a_turn_do_not_count_for_the_next_turn() -> None:
    scheduler = new_scheduler()
    first, second = (added(scheduler, 1000, granted=granted) for granted in (3, 1))
    taken(scheduler)
    for ticket in (first, second):
        scheduler.grant(ticket, 100)
    assert [taken(scheduler) for _ in range(2)] == [{first: LIMIT}, {second: LIMIT}]


def test_models_take_turns_and_share_no_batch() -> None:
    scheduler = new_scheduler()
    for model in "ab":
        added(scheduler, 20, model=model)
    batches = [scheduler.take() for _ in range(6)]
    assert [batch.graph for batch in batches if batch] == list("ababab")


def test_no_more_rows_are_taken_than_granted() -> None:
    scheduler = new_scheduler()
    ticket = added(scheduler, 100, granted=3)
    assert taken(scheduler) == {ticket: 3}
    assert scheduler.take() is None
    scheduler.grant(ticket, 2)
    assert taken(scheduler) == {ticket: 2}


def test_dropped_rows_do_not_run() -> None:
    scheduler = new_scheduler()
    ticket, other = added(scheduler, 5), added(scheduler, 1)
    scheduler.drop(ticket)
    assert scheduler.waiting == 1
    assert taken(scheduler) == {other: 1}
    scheduler.grant(ticket, 3)
    assert scheduler.take() is None


def test_a_new_limit_holds_from_the_next_batch_on() -> None:
    scheduler = new_scheduler()
    ticket = added(scheduler, 100)
    scheduler.set_limit("m", 3)
    assert taken(scheduler) == {ticket: 3}
    assert (scheduler.limits["m"], scheduler.limits["a"]) == (3, LIMIT)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_batches_are_full_while_rows_wait_except_for_batches_of_new_requests(sizes: list[int]) -> None:
    scheduler = new_scheduler()
    tickets = [added(scheduler, size) for size in sizes]
    hurried = False
    while scheduler.waiting:
        batch = scheduler.take()
        assert batch is not None
        if batch.closed == "fresh":
            assert batch.rows <= LIMIT // 4
            assert not hurried
        else:
            assert batch.rows == LIMIT if scheduler.waiting else batch.rows <= LIMIT
        hurried = batch.closed == "fresh"
    assert all(ticket.taken == size for ticket, size in zip(tickets, sizes, strict=True))


class Rows(RuleBasedStateMachine):
    """Grants, drops and takes in any order. Each row runs once, in order, with rows of its model, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = new_scheduler()
        self.tickets: list[Ticket[Any]] = []
        self.dropped: set[Ticket[Any]] = set()
        self.seen: dict[Ticket[Any], int] = {}

    @rule(rows=st.integers(1, 30), granted=st.integers(0, 30), model=st.sampled_from("ab"))
    def submit(self, rows: int, granted: int, model: str) -> None:
        self.tickets.append(added(self.scheduler, rows, granted, model))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), rows=st.integers(0, 10))
    def grant(self, data: st.DataObject, rows: int) -> None:
        self.scheduler.grant(data.draw(st.sampled_from(self.tickets)), rows)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))
        self.dropped.add(ticket)
        self.scheduler.drop(ticket)

    @rule(model=st.sampled_from("ab"), rows=st.integers(1, LIMIT))
    def limit(self, model: str, rows: int) -> None:
        self.scheduler.set_limit(model, rows)

    @rule(runners=st.integers(1, 3))
    def take(self, runners: int) -> None:
        batch: Batch[Any] | None = self.scheduler.take(runners)
        if batch is None:
            assert self.scheduler.waiting == 0
            return
        assert 0 < batch.rows == sum(hi - lo for _, lo, hi in batch.pieces) <= self.scheduler.limits[batch.graph]
        for ticket, lo, hi in batch.pieces:
            assert ticket.graph == batch.graph
            assert ticket not in self.dropped
            assert self.seen.get(ticket, 0) == lo < hi <= ticket.granted <= ticket.rows
            self.seen[ticket] = hi

    @invariant()
    def waiting_is_what_was_granted_and_not_taken(self) -> None:
        live = [ticket for ticket in self.tickets if ticket not in self.dropped]
        assert self.scheduler.waiting == sum(ticket.granted - self.seen.get(ticket, 0) for ticket in live)


TestRows = Rows.TestCase
TestRows.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
