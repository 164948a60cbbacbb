"""The order in which rows run: deficit round robin between requests (Shreedhar and Varghese, 1996).

This module has no thread and no clock. Requests are divisible, so a deficit is what remains of a request's turn when a
batch is full. Requests that have not run yet go first (as new flows do in FQ-CoDel, RFC 8290). If they need at most a
quarter of a batch they get a batch of their own, never twice in a row. Otherwise half of each batch is reserved for
requests that have run before. So a stream of a million rows delays a single row by less than one batch, and single
rows never starve the stream.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

PARTS = 4  # a free runner takes at least this part of a full batch; a batch of new requests has at most this part

Owner = TypeVar("Owner")


@dataclass(slots=True, eq=False)
class Ticket(Generic[Owner]):
    """Rows 0 .. rows - 1 of one request, which run in order.

    owner: the request.
    graph: rows of one graph share batches.
    granted: rows that may run by now; more are granted as the client takes results.
    taken: rows that went into a batch.
    deficit: rows left of the turn.
    """

    owner: Owner
    graph: Hashable
    rows: int
    granted: int = 0
    taken: int = 0
    deficit: int = 0
    queued: bool = False

    @property
    def waiting(self) -> int:
        """Rows that may run and did not go into a batch yet."""
        return self.granted - self.taken


class Piece(NamedTuple, Generic[Owner]):
    """Rows lo .. hi - 1 of a request, in a batch."""

    owner: Owner
    lo: int
    hi: int


# Why a batch took no more rows: it is full; no more rows wait; other runners take the rest; or it is a batch of
# requests that have not run yet.
Closed = Literal["full", "drained", "shared", "fresh"]


class Batch(NamedTuple, Generic[Owner]):
    graph: Any
    pieces: list[Piece[Owner]]
    rows: int
    closed: Closed


@dataclass(slots=True)
class _Queue(Generic[Owner]):
    """Tickets of one graph.

    limit: rows of a batch.
    waiting: rows that wait.
    fresh_alone: the last batch was for new requests alone.
    fresh, turned: tickets that wait; fresh ones had no turn yet.
    """

    limit: int
    waiting: int = 0
    fresh_alone: bool = False
    fresh: deque[Ticket[Owner]] = field(default_factory=deque)
    turned: deque[Ticket[Owner]] = field(default_factory=deque)


class Scheduler(Generic[Owner]):
    """The one queue: tickets go in, batches come out. Graphs take turns.

    waiting: rows that wait.
    limits: rows of a batch, at most, by graph.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self.limits: dict[Hashable, int] = {}
        self._queues: OrderedDict[Hashable, _Queue[Owner]] = OrderedDict()  # by graph, the next one first

    def grant(self, ticket: Ticket[Owner], rows: int) -> None:
        """Let `rows` more rows of the ticket run, at most all it has left."""
        rows = max(0, min(rows, ticket.rows - ticket.granted))
        if not rows:
            return
        queue = self._queues.get(ticket.graph)
        if queue is None:
            queue = self._queues[ticket.graph] = _Queue(self.limits[ticket.graph])
        ticket.granted += rows
        queue.waiting += rows
        self.waiting += rows
        if not ticket.queued:
            (queue.turned if ticket.taken else queue.fresh).append(ticket)
            ticket.queued = True

    def drop(self, ticket: Ticket[Owner]) -> None:
        """Forget the ticket's rows that wait; no more rows can be granted."""
        waiting = ticket.granted - ticket.taken
        if waiting:
            self._queues[ticket.graph].waiting -= waiting
            self.waiting -= waiting
        ticket.rows = ticket.granted = ticket.taken

    def take(self, runners: int = 1) -> Batch[Owner] | None:
        """Take the next batch: rows of the graph whose turn it is, as many as wait and fit.

        runners: free runners, the caller included; they share the waiting rows if each has enough to do

        Returns: the batch; None if no rows wait
        """
        while self._queues:
            graph, queue = self._queues.popitem(last=False)
            least = max(1, queue.limit // PARTS)
            share = min(queue.limit, max(-(-queue.waiting // runners), least))
            pieces: dict[Ticket[Owner], int] = {}  # and the first row taken of each
            reserved = 0  # rows for tickets that had a turn
            if queue.turned:
                reserved = -(-share // 2) if queue.fresh_alone else share // 2
            may_be_alone = bool(queue.turned) and not queue.fresh_alone and queue.waiting > queue.limit
            room = reserved + self._serve(queue.fresh, queue, share - reserved, pieces)
            queue.fresh_alone = may_be_alone and 0 < share - room <= least
            if not queue.fresh_alone and room:
                room = self._serve(queue.turned, queue, room, pieces)
                room = self._serve(queue.fresh, queue, room, pieces)
            if queue.fresh or queue.turned:
                self._queues[graph] = queue
            if pieces:
                rows = share - room
                queue.waiting -= rows
                self.waiting -= rows
                return Batch(
                    graph,
                    [Piece(ticket.owner, lo, ticket.taken) for ticket, lo in pieces.items()],
                    rows,
                    self._why_closed(queue, rows),
                )
        return None

    def set_limit(self, graph: Hashable, rows: int) -> None:
        """Bound batches of this graph from now on. Must be called before the first ticket of the graph."""
        self.limits[graph] = rows
        if graph in self._queues:
            self._queues[graph].limit = rows

    def _why_closed(self, queue: _Queue[Owner], rows: int) -> Closed:
        if queue.fresh_alone:
            return "fresh"
        if rows == queue.limit:
            return "full"
        return "shared" if queue.fresh or queue.turned else "drained"

    def _serve(
        self, line: deque[Ticket[Owner]], queue: _Queue[Owner], room: int, pieces: dict[Ticket[Owner], int]
    ) -> int:
        """Give the tickets in the line their turns until there is no room. Returns the room left."""
        while line and room:
            ticket = line[0]
            waiting = ticket.granted - ticket.taken
            ticket.deficit = ticket.deficit or queue.limit
            rows = min(waiting, ticket.deficit, room)
            if rows:
                pieces.setdefault(ticket, ticket.taken)
                ticket.taken += rows
                ticket.deficit -= rows
                room -= rows
            if rows == waiting:
                ticket.deficit = 0
                ticket.queued = False
                line.popleft()
            elif not ticket.deficit or line is queue.fresh:
                line.popleft()
                queue.turned.append(ticket)
        return room
