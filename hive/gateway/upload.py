"""A large body on its way: what comes from the client goes to its engine, as fast as both can.

An engine that has not got everything computes nothing, though it may refuse. So until then an
upload is no work of the engine, and the client's slowness is not the engine's.
"""

from collections.abc import Callable

from hive.gateway.answer import Answer
from hive.gateway.bodies import Rest
from hive.policy.framing import chunk
from hive.workers.wire import Wire


async def pour(
    rest: Rest, wire: Wire, answer: Answer, all_sent: Callable[[], None], *, is_chunked: bool
) -> None:
    """Send on what comes, until that was all or the engine wants no more; `answer` hears why not."""
    passage = answer.passage
    try:
        while True:
            passage.is_uploading = True
            part = await rest.part()
            passage.is_uploading = False
            passage.bytes_in += len(part)
            is_last = not part
            goes_on = await wire.send(chunk(part) if is_chunked else part, is_last=is_last)
            if not goes_on:
                return
            answer.is_taken()
            if is_last:
                all_sent()
                return
    except Exception as exc:  # noqa: BLE001 (its request ends with it, and tells it)
        answer.end(exc)
    finally:
        passage.is_uploading = False
