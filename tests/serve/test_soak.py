"""Clients of all kinds come and go for an hour, or for SOAK_MINUTES: nothing fails, no slot is lost, memory is flat."""

import asyncio
import os
import sys

import http_load
import pytest

SOAK_MINUTES = float(os.environ.get("SOAK_MINUTES", "60"))
N_SLOTS, N_QUEUED, N_CLIENTS = 16, 8, 40  # more clients than places: some are refused
MAX_GROWTH_MB = 5


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_soak_loses_nothing() -> None:
    command = [sys.executable, "-m", "tinystories", "serve", "--port", "0", "--engine", "cpu", "--log-level", "warning"]
    command += ["--slots", str(N_SLOTS), "--queue", str(N_QUEUED), "--timeout", "3600"]  # however busy the machine is
    with http_load.running(command) as server:
        warmup_s = min(300.0, 60 * SOAK_MINUTES / 3)
        asyncio.run(http_load.soak(server, seconds=warmup_s, n_clients=N_CLIENTS, seed=1))
        before_mb = server.rss_mb
        seconds = 60 * SOAK_MINUTES - warmup_s
        counts = asyncio.run(http_load.soak(server, seconds=seconds, n_clients=N_CLIENTS, seed=2))
        growth_mb = server.rss_mb - before_mb
        asyncio.run(server.wait_for(lambda health: health["busy"] == health["queued"] == 0))
        asyncio.run(all_slots_work(server))
        assert "Traceback" not in server.errors
    assert counts
    assert abs(growth_mb) <= MAX_GROWTH_MB, f"{growth_mb:+.1f} MB after {sum(counts.values())} requests"
    sys.stdout.write(f"{SOAK_MINUTES:g} minutes: {counts}, {growth_mb:+.1f} MB\n")  # pytest -s shows it


async def all_slots_work(server: http_load.ServerProcess) -> None:
    """Return once every slot has been busy at the same time, and free again."""
    endless = {"prompt": "", "max_tokens": 10_000, "ignore_eos": True, "stream": True}
    async with http_load.endless_streams(server.port, N_SLOTS, endless):
        await server.wait_for(lambda health: health["busy"] == N_SLOTS)
    await server.wait_for(lambda health: health["busy"] == 0)
