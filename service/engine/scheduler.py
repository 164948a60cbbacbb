"""Which rows run next: deficit round robin between requests (Shreedhar and Varghese, 1996). No thread, no clock.

Requests are divisible, so a deficit is what a request has left of its turn when a batch is full. A request that has
had no turn yet goes before those that have (as new flows do in FQ-CoDel, RFC 8290), in a batch of its own if that is
small. But every other batch is for the latter, or half of each where the former are many: a stream of a million rows
delays a single row by less than one batch, and single rows never starve the stream.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar


class Ticket:
    """The rows 0 .. rows - 1 of one request, computed in order. Only rows of the same model share a batch."""

    granted = 0  # rows that may be computed by now; more are granted as the client takes what is done
    taken = 0  # rows that went into a batch
    deficit = 0  # rows left of its turn
    queued = False

    def __init__(self, model: Any, rows: int) -> None:
        self.model = model
        self.rows = rows

    @property
    def waiting(self) -> int:
        return self.granted - self.taken


PARTS = 4  # a free runner takes at least this part of a full batch; one for fresh tickets alone is at most as large

T = TypeVar("T", bound=Ticket)


class Piece(NamedTuple, Generic[T]):
    """Rows lo .. hi - 1 of a ticket."""

    ticket: T
    lo: int
    hi: int


# No more rows fit; no more wait; more do, but go to other runners; or after these few, whose first turn it is.
Closed = Literal["full", "drained", "shared", "fresh"]


class Batch(NamedTuple, Generic[T]):
    model: Any
    pieces: list[Piece[T]]
    rows: int
    closed: Closed


@dataclass(slots=True)
class _Queue(Generic[T]):
    """What waits for one model."""

    limit: int  # rows of a batch
    waiting: int = 0
    hurried: bool = False  # the last batch was for the fresh alone
    fresh: deque[T] = field(default_factory=deque)  # no turn yet
    turned: deque[T] = field(default_factory=deque)


class Scheduler(Generic[T]):
    """The one queue: tickets go in, batches come out.

    waiting: rows that wait.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self._queues: OrderedDict[Hashable, _Queue[T]] = OrderedDict()  # by model, the next one first
        self._limits: dict[Hashable, int] = {}

    def grant(self, ticket: T, rows: int) -> None:
        """Let `rows` more rows of the ticket be computed, at most as many as it has."""
        rows = max(0, min(rows, ticket.rows - ticket.granted))
        if not rows:
            return
        queue = self._queues.get(ticket.model)
        if queue is None:
            queue = self._queues[ticket.model] = _Queue(self.limit(ticket.model))
        ticket.granted += rows
        queue.waiting += rows
        self.waiting += rows
        if not ticket.queued:
            (queue.turned if ticket.taken else queue.fresh).append(ticket)
            ticket.queued = True

    def drop(self, ticket: T) -> None:
        """Forget the rows of the ticket that wait; nothing can be granted to it any more."""
        if ticket.waiting:
            self._queues[ticket.model].waiting -= ticket.waiting
            self.waiting -= ticket.waiting
        ticket.rows = ticket.granted = ticket.taken

    def take(self, runners: int = 1) -> Batch[T] | None:
        """The next batch: of the model whose turn it is, as many rows as wait and fit. None if nothing waits.

        runners: those that are free, this one included. They share what waits, if each has enough to do.
        """
        while self._queues:
            model, queue = self._queues.popitem(last=False)
            least = max(1, queue.limit // PARTS)
            share = min(queue.limit, max(-(-queue.waiting // runners), least))
            pieces: dict[T, int] = {}  # and the first row taken of each
            kept = 0  # for those that had a turn
            if queue.turned:
                kept = -(-share // 2) if queue.hurried else share // 2
            may_hurry = bool(queue.turned) and not queue.hurried and queue.waiting > queue.limit
            room = kept + self._serve(queue.fresh, queue, share - kept, pieces)
            queue.hurried = may_hurry and 0 < share - room <= least
            if not queue.hurried:
                room = self._serve(queue.turned, queue, room, pieces)
                room = self._serve(queue.fresh, queue, room, pieces)
            if queue.fresh or queue.turned:
                self._queues[model] = queue
            if pieces:
                rows = share - room
                queue.waiting -= rows
                self.waiting -= rows
                cut = [Piece(ticket, lo, ticket.taken) for ticket, lo in pieces.items()]
                return Batch(model, cut, rows, self._why(queue, rows))
        return None

    def limit(self, model: Hashable) -> int:
        """Rows of a batch of this model."""
        return self._limits[model]

    def set_limit(self, model: Hashable, rows: int) -> None:
        """From now on; before the first ticket of a model."""
        self._limits[model] = rows
        if model in self._queues:
            self._queues[model].limit = rows

    def _why(self, queue: _Queue[T], rows: int) -> Closed:
        if queue.hurried:
            return "fresh"
        if rows == queue.limit:
            return "full"
        return "shared" if queue.fresh or queue.turned else "drained"

    def _serve(self, line: deque[T], queue: _Queue[T], room: int, pieces: dict[T, int]) -> int:
        """Give the tickets in the line their turns until there is no room. Returns the room left."""
        while line and room:
            ticket = line[0]
            ticket.deficit = ticket.deficit or queue.limit
            rows = min(ticket.waiting, ticket.deficit, room)
            if rows:
                pieces.setdefault(ticket, ticket.taken)
                ticket.taken += rows
                ticket.deficit -= rows
                room -= rows
            if not ticket.waiting:
                ticket.deficit = 0
                ticket.queued = False
                line.popleft()
            elif not ticket.deficit or line is queue.fresh:
                line.popleft()
                queue.turned.append(ticket)
        return room
