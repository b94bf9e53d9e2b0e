"""When a server is at rest again: nothing runs or waits, and every page is given back."""

import time

from server_process import PAGES, ROWS, ServerProcess

USED, CACHED, FREE = (f'jaxinfer_pages{{state="{state}"}}' for state in ("used", "cached", "free"))


def wait_idle(server: ServerProcess, seconds: float = 30.0) -> float:
    """Seconds until nothing runs or waits. AssertionError if that takes too long, or if pages are not exact then."""
    began = time.monotonic()
    while True:
        found = server.metrics()
        busy = {name: found[f"jaxinfer_{name}"] for name in ("requests_running", "requests_waiting",
                                                             "prompt_tokens_waiting")}
        if not any(busy.values()) and not found[USED]:
            break
        assert time.monotonic() - began < seconds, f"after {seconds:g} s: {busy}, pages held: {found[USED]}"
        time.sleep(0.02)
    assert (found[USED], found[CACHED] + found[FREE]) == (0, PAGES), "free + cached + held pages are not the total"
    assert not found["jaxinfer_idle_leaks_total"]
    return time.monotonic() - began


def check_all_rows(server: ServerProcess) -> None:
    """As many streams as there are rows run at once: no row was lost."""
    with server.client() as client:
        streams = [client.stream("import", max_tokens=200, ignore_eos=True, temperature=0, timeout=60)
                   for _ in range(ROWS)]
        began = time.monotonic()
        while server.metrics()["jaxinfer_requests_running"] < ROWS:
            assert time.monotonic() - began < 30, "a row of the batch was lost"
            time.sleep(0.01)
        for stream in streams:
            stream.cancel()
    wait_idle(server)
