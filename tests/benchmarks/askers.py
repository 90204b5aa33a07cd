"""How soon a server answers processes that ask it for their budgets, and how often it has the same found.

    python -m tests.benchmarks.askers sqlite:////tmp/large.db 14

The ledger is one of tests.benchmarks.queries. Each asks what every customer used, twice at once, and then whenever ten
times as long as an answer took is over, for 25 seconds.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from unittest import mock

from spryng_instrument.server.app import make_app
from spryng_instrument.store import open_store
from tests import test_under_load
from tests.test_under_load import Client

SECONDS = 25.0


async def main(url: str, processes: int) -> None:
    store = open_store(url)
    questions = mock.patch.object(store, "usage_and_total", wraps=store.usage_and_total).start()
    app = make_app(store, open_to_local=True)
    took: list[float] = []
    async with app.router.lifespan_context(app):
        client, end = Client(app), time.monotonic() + SECONDS

        async def process() -> None:
            while (began := time.monotonic()) < end:
                assert (await client.get("/usage?by=key")).status == 200
                took.append(time.monotonic() - began)
                pause = 10 * took[-1] if len(took) > processes else 0.1
                await asyncio.sleep(max(0.0, min(pause, end - time.monotonic())))

        cpu = time.process_time()
        await asyncio.gather(*(process() for _ in range(processes)))
        cpu = time.process_time() - cpu
    print(
        f"{processes} processes: {len(took)} answers of {questions.call_count} questions, "
        f"median {statistics.median(took):.1f} s, longest {max(took):.1f} s, {cpu:.1f} s of CPU"
    )


if __name__ == "__main__":
    test_under_load.PATIENCE_S = 300.0
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
