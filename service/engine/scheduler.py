"""The order of rows: deficit round robin between requests (Shreedhar and Varghese, 1996).

This module has no thread and no clock. Requests are divisible: if a batch is full before a request's turn ends, the
deficit is the rest of the turn. Requests that have not run yet go first, like new flows in FQ-CoDel (RFC 8290). If the
new requests need at most a quarter of a batch, they get their own batch, never twice in a row. Otherwise half of each
batch is reserved for requests that have run before. So a stream of a million rows delays a single row by less than one
batch, and single rows never starve the stream.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

PARTS = 4  # a batch shared with other free runners has at least 1/4 of the limit; a batch of new requests at most 1/4

Owner = TypeVar("Owner")


@dataclass(slots=True, eq=False)
class Ticket(Generic[Owner]):
    """Rows 0 .. rows - 1 of one request. The rows go into batches in order.

    owner: the request.
    graph: key of the graph. Only rows of one graph run in one batch.
    rows: number of rows in all; `drop` reduces the number to `taken`.
    granted: number of rows that may run; grows as the client takes results.
    taken: number of rows already in a batch.
    deficit: number of rows left of the request's turn.
    queued: the ticket is in a queue of its graph.
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
        """Number of granted rows not yet in a batch."""
        return self.granted - self.taken


class Piece(NamedTuple, Generic[Owner]):
    """Rows lo .. hi - 1 of a request, in a batch.

    owner: the request.
    """

    owner: Owner
    lo: int
    hi: int


# Why a batch took no more rows: the batch is full; the graph has no more rows; other runners take the remaining rows;
# or the batch is for requests that have not run yet.
Closed = Literal["full", "drained", "shared", "fresh"]


class Batch(NamedTuple, Generic[Owner]):
    """Rows of one graph, to run together.

    graph: key of the graph, as in Ticket.
    pieces: rows of each request in the batch.
    rows: number of rows in all pieces.
    closed: why the batch took no more rows.
    """

    graph: Any
    pieces: list[Piece[Owner]]
    rows: int
    closed: Closed


@dataclass(slots=True)
class _GraphQueue(Generic[Owner]):
    """Tickets of one graph.

    limit: largest number of rows in a batch.
    waiting: number of rows in the queue.
    fresh_alone: the last batch was for new requests alone.
    fresh: tickets that have not had a turn.
    turned: tickets that have had a turn.
    """

    limit: int
    waiting: int = 0
    fresh_alone: bool = False
    fresh: deque[Ticket[Owner]] = field(default_factory=deque)
    turned: deque[Ticket[Owner]] = field(default_factory=deque)


class Scheduler(Generic[Owner]):
    """Makes batches from tickets. Graphs take turns.

    waiting: number of rows in the queues of all graphs.
    limits: largest number of rows in a batch, by graph.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self.limits: dict[Hashable, int] = {}
        self._queues: OrderedDict[Hashable, _GraphQueue[Owner]] = OrderedDict()  # by graph, the next graph first

    def grant(self, ticket: Ticket[Owner], rows: int) -> None:
        """Let `rows` more rows of the ticket run, or all remaining rows if fewer remain."""
        rows = max(0, min(rows, ticket.rows - ticket.granted))
        if not rows:
            return
        queue = self._queues.get(ticket.graph)
        if queue is None:
            queue = self._queues[ticket.graph] = _GraphQueue(self.limits[ticket.graph])
        ticket.granted += rows
        queue.waiting += rows
        self.waiting += rows
        if not ticket.queued:
            (queue.turned if ticket.taken else queue.fresh).append(ticket)
            ticket.queued = True

    def drop(self, ticket: Ticket[Owner]) -> None:
        """Remove the ticket's rows from the queue. No further row of the ticket runs."""
        waiting = ticket.granted - ticket.taken
        if waiting:
            self._queues[ticket.graph].waiting -= waiting
            self.waiting -= waiting
        ticket.rows = ticket.granted = ticket.taken

    def take(self, runners: int = 1) -> Batch[Owner] | None:
        """Take the next batch, from the graph whose turn has come.

        runners: number of free runners, including the caller. Free runners share the waiting rows, with at least a
            quarter of a full batch for each.

        Returns: the batch; None if no rows wait.
        """
        while self._queues:
            graph, queue = self._queues.popitem(last=False)
            least = max(1, queue.limit // PARTS)
            share = min(queue.limit, max(-(-queue.waiting // runners), least))
            pieces: dict[Ticket[Owner], int] = {}  # first row taken of each ticket
            reserved = 0  # rows for tickets that have had a turn
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
        """Limit batches of this graph to `rows` rows from now on. Call this before the graph's first ticket."""
        self.limits[graph] = rows
        if graph in self._queues:
            self._queues[graph].limit = rows

    def _why_closed(self, queue: _GraphQueue[Owner], rows: int) -> Closed:
        if queue.fresh_alone:
            return "fresh"
        if rows == queue.limit:
            return "full"
        return "shared" if queue.fresh or queue.turned else "drained"

    def _serve(
        self, line: deque[Ticket[Owner]], queue: _GraphQueue[Owner], room: int, pieces: dict[Ticket[Owner], int]
    ) -> int:
        """Take rows of the tickets in the line, in turn, until there is no room.

        line: queue.fresh or queue.turned.
        room: number of rows that fit into the batch.
        pieces: first row taken of each ticket; extended here.

        Returns: the room left.
        """
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
